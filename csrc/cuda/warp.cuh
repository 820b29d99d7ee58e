// What the kernels use of the machine: threads, shared memory, collectives of a warp, tensor cores, asynchronous
// copies.
//
// Compiled by nvcc, these are the instructions. Compiled by a C++ compiler (GTP_EMULATE_CUDA), they are those of
// tests/native/emulated_gpu.h, which runs the threads of a block as fibers, so that a test executes every line of the
// very kernels. A collective is for all 32 lanes of a warp, always.
#pragma once

#include <cstdint>

#ifdef GTP_EMULATE_CUDA
#include "emulated_gpu.h"
#else

#define GTP_GLOBAL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define GTP_DEVICE __device__ __forceinline__
#define GTP_HOST_DEVICE __host__ __device__
#define GTP_CONSTANT const __grid_constant__
// The dynamic shared memory of the block, aligned to 16 bytes.
#define GTP_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define GTP_UNROLL _Pragma("unroll")
#define GTP_NO_UNROLL _Pragma("unroll 1")

namespace gtp {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

GTP_DEVICE void sync_block() {
  __syncthreads();
}
GTP_DEVICE void sync_warp() {
  __syncwarp();
}
template <class T>
GTP_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
template <class T>
GTP_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <class T>
GTP_DEVICE T shuffle_up(T value, int delta) {
  return __shfl_up_sync(kAllLanes, value, delta);
}
GTP_DEVICE unsigned ballot(bool vote) {
  return __ballot_sync(kAllLanes, vote);
}

// *target += value, in shared or global memory; what was there before.
GTP_DEVICE int atomic_add(int* target, int value) {
  return atomicAdd(target, value);
}
// The same for *target = value, and for the larger of the two.
GTP_DEVICE int atomic_exchange(int* target, int value) {
  return atomicExch(target, value);
}
GTP_DEVICE uint32_t atomic_max(uint32_t* target, uint32_t value) {
  return atomicMax(target, value);
}

// A place in shared memory, in one register.
using Address = uint32_t;
GTP_DEVICE Address shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory, both aligned to 16; zeros where not valid (source is then not read).
GTP_DEVICE void copy_async(void* target, const void* source, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(target)), "l"(source), "r"(bytes)
               : "memory");
}
GTP_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
// Waits until all but the last `kPending` groups of this thread's copies have landed; others see them after sync_block.
template <int kPending>
GTP_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// count += key < limit. The compiler makes three instructions of it, where two will do.
GTP_DEVICE void count_below(int& count, uint32_t key, uint32_t limit) {
  asm("{\n.reg .pred p;\nsetp.lt.u32 p, %1, %2;\n@p add.s32 %0, %0, 1;\n}\n" : "+r"(count) : "r"(key), "r"(limit));
}
// Appends a key to an array of them in shared memory where key - low < width, and moves `end` behind it.
GTP_DEVICE void append_within(Address& end, uint32_t key, uint32_t low, uint32_t width) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .u32 d;\nsub.u32 d, %1, %2;\nsetp.lt.u32 p, d, %3;\n"
      "@p st.shared.u32 [%0], %1;\n@p add.u32 %0, %0, 4;\n}\n"
      : "+r"(end)
      : "r"(key), "r"(low), "r"(width)
      : "memory");
}

// Four 8 x 8 matrices of 16-bit values from shared memory: lane i names row i % 8 of matrix i / 8 (16 bytes, aligned).
// r[m] of lane i: the pair (row i / 4, columns 2 (i % 4) and that + 1) of matrix m, or with kTranspose of its
// transpose.
template <bool kTranspose>
GTP_DEVICE void load_matrices(uint32_t (&r)[4], Address row) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  }
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// c += a b for a 16 x 16 a (rows), 16 x 8 b (columns) and 16 x 8 c. Lane i, with g = i / 4 and t = i % 4, holds
// a[0]: (g, 2t), a[1]: (g + 8, 2t), a[2]: (g, 2t + 8), a[3]: (g + 8, 2t + 8); b[0]: (2t, g), b[1]: (2t + 8, g): each
// the pair with the next k in the high half; c[0], c[1]: (g, 2t), (g, 2t + 1), c[2], c[3]: the same of row g + 8.
GTP_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
GTP_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two float32 rounded to nearest even, the first in the low half.
GTP_DEVICE uint32_t pack(float low, float high, BFloat16) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
GTP_DEVICE uint32_t pack(float low, float high, Float16) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
GTP_DEVICE float widen(uint16_t bits, BFloat16) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
GTP_DEVICE float widen(uint16_t bits, Float16) {
  float value;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(value) : "h"(bits));
  return value;
}

// 2^x by the special function unit, within 2 ulp; 0 where it is less than the least normal float, as what it should be
// there takes three more instructions.
GTP_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
// 1 / sqrt(x) within 2 ulp.
GTP_DEVICE float rsqrt_fast(float x) {
  return rsqrtf(x);
}
// x, which the compiler does not know to be: what it computed from x before, or could compute before a loop, it
// computes again here instead of keeping it in registers.
GTP_DEVICE uint32_t forget(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
GTP_DEVICE int forget(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
GTP_DEVICE uint32_t bits_of(float x) {
  return __float_as_uint(x);
}
GTP_DEVICE float float_of(uint32_t bits) {
  return __uint_as_float(bits);
}
GTP_DEVICE int leading_zeros(uint32_t x) {
  return __clz(static_cast<int>(x));
}
GTP_DEVICE int count_bits(uint32_t x) {
  return __popc(x);
}
// The position of the lowest bit that is set; x is not 0.
GTP_DEVICE int lowest_bit(uint32_t x) {
  return __ffs(static_cast<int>(x)) - 1;
}

}  // namespace cuda
}  // namespace gtp

#endif  // GTP_EMULATE_CUDA

namespace gtp {
namespace cuda {

constexpr int kLanes = 32;
constexpr float kInfinity = __builtin_huge_valf();

GTP_DEVICE int lane_id() {
  return static_cast<int>(threadIdx.x) % kLanes;
}
GTP_DEVICE int warp_id() {
  return static_cast<int>(threadIdx.x) / kLanes;
}

// Sums and maxima over groups of lanes, every lane with the result; the order does not depend on the run. `kGroup`
// lanes that follow each other form a group.
template <int kGroup = kLanes, class T>
GTP_DEVICE T sum_lanes(T value) {
  GTP_UNROLL
  for (int mask = kGroup / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
template <int kGroup = kLanes>
GTP_DEVICE float max_lanes(float value) {
  GTP_UNROLL
  for (int mask = kGroup / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}
// op over 4 lanes that follow each other, of two values each.
template <class Op>
GTP_DEVICE void combine_pair(float (&values)[2], const Op& op) {
  const bool odd = lane_id() % 2;
  float mine = odd ? values[1] : values[0];
  mine = op(mine, shuffle_xor(odd ? values[0] : values[1], 1));
  mine = op(mine, shuffle_xor(mine, 2));
  const float theirs = shuffle_xor(mine, 1);
  values[0] = odd ? theirs : mine;
  values[1] = odd ? mine : theirs;
}
// The sum of the lanes before this one and of this one.
GTP_DEVICE int scan_lanes(int value) {
  GTP_UNROLL
  for (int delta = 1; delta < kLanes; delta *= 2) {
    const int before = shuffle_up(value, delta);
    value += lane_id() >= delta ? before : 0;
  }
  return value;
}

}  // namespace cuda
}  // namespace gtp
