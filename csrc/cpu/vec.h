// Vectors of one register of the instruction set that this file is compiled for.
//
// Everything here is `static` or lives in the namespace GTP_ISA, because the same source is compiled several times into
// one library: an inline function of external linkage would be merged across instruction sets, and the machine would
// run whichever copy the linker kept. For the same reason no std template is used in the files that include this one.
//
// vmax(a, b) is b where either is NaN, as the x86 instruction has it.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef GTP_ISA
#define GTP_ISA baseline
#endif

#if defined(__AVX512F__)
#define GTP_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define GTP_VECTOR_BYTES 32
#else
#define GTP_VECTOR_BYTES 16
#endif

#define GTP_INLINE static inline __attribute__((always_inline))
#define GTP_INLINE_MEMBER inline __attribute__((always_inline))

namespace gtp {
namespace GTP_ISA {

typedef float vfloat __attribute__((vector_size(GTP_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(GTP_VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(GTP_VECTOR_BYTES)));
typedef int64_t vlong __attribute__((vector_size(GTP_VECTOR_BYTES)));
typedef float vfloat4 __attribute__((vector_size(16)));

template <class T>
struct Vec;

template <>
struct Vec<float> {
  using V = vfloat;
  using I = vint;
  using Int = int32_t;
  using Bits = uint32_t;
  static constexpr int W = GTP_VECTOR_BYTES / 4;
  static constexpr bool is_floating = true;
  static constexpr float inf = __builtin_inff();
  static constexpr float nan = __builtin_nanf("");
};

template <>
struct Vec<double> {
  using V = vdouble;
  using I = vlong;
  using Int = int64_t;
  using Bits = uint64_t;
  static constexpr int W = GTP_VECTOR_BYTES / 8;
  static constexpr bool is_floating = true;
  static constexpr double inf = __builtin_inf();
  static constexpr double nan = __builtin_nan("");
};

template <class T>
GTP_INLINE typename Vec<T>::V load(const T* p) {
  typename Vec<T>::V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
GTP_INLINE void store(T* p, typename Vec<T>::V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T>
GTP_INLINE typename Vec<T>::V splat(T x) {
  return x - typename Vec<T>::V{};
}

GTP_INLINE vint splat_bits(int32_t x) {
  return x - vint{};
}

template <class To, class From>
GTP_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

GTP_INLINE vfloat vmax(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

GTP_INLINE vdouble vmax(vdouble a, vdouble b) {
  return a > b ? a : b;
}

GTP_INLINE float root(float x) {
  return __builtin_sqrtf(x);
}

GTP_INLINE double root(double x) {
  return __builtin_sqrt(x);
}

template <class T>
GTP_INLINE T reduce_sum(typename Vec<T>::V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps((__m512)v);
#endif
  T lanes[Vec<T>::W];
  store(lanes, v);
  for (int half = Vec<T>::W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <class T>
GTP_INLINE T reduce_max(typename Vec<T>::V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_max_ps((__m512)v);
#endif
  T lanes[Vec<T>::W];
  store(lanes, v);
  for (int half = Vec<T>::W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0];
}

template <class T>
GTP_INLINE int64_t reduce_count(typename Vec<T>::I v) {
  typename Vec<T>::Int lanes[Vec<T>::W];
  __builtin_memcpy(lanes, &v, sizeof v);
  int64_t sum = 0;
  for (int i = 0; i < Vec<T>::W; ++i) sum += lanes[i];
  return sum;
}

// A set of integers as bits, held in registers: members() tests a vector of them at once.
#if defined(__AVX512F__)
constexpr int kSetLanes = 16, kSetWords = 32;
#elif defined(__AVX2__)
constexpr int kSetLanes = 8, kSetWords = 8;
#else
constexpr int kSetLanes = 0, kSetWords = 0;  // not worth it: the caller looks them up one by one
#endif

// Bit i of the result: whether the set has index[i], for the first `count` of them, at most kSetLanes. `outside`
// becomes true where one is not in [0, size), size <= 32 * kSetWords.
GTP_INLINE uint32_t members(const uint32_t* set, const int32_t* index, int64_t count, int64_t size, bool& outside) {
#if defined(__AVX512F__)
  const __mmask16 lanes = static_cast<__mmask16>(count < 16 ? (1u << count) - 1 : 0xffffu);
  const __m512i i = _mm512_maskz_loadu_epi32(lanes, index);
  outside |= _mm512_mask_cmplt_epu32_mask(lanes, i, _mm512_set1_epi32(static_cast<int32_t>(size))) != lanes;
  const __m512i words =
      _mm512_permutex2var_epi32(_mm512_loadu_si512(set), _mm512_srli_epi32(i, 5), _mm512_loadu_si512(set + 16));
  const __m512i bit = _mm512_sllv_epi32(_mm512_set1_epi32(1), _mm512_and_si512(i, _mm512_set1_epi32(31)));
  return _mm512_mask_test_epi32_mask(lanes, words, bit);
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count < 8 ? count : 8)),
                                           _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const __m256i i = _mm256_maskload_epi32(index, lanes);
  const __m256i most = _mm256_set1_epi32(static_cast<int32_t>(size - 1));
  const __m256i beyond = _mm256_andnot_si256(_mm256_cmpeq_epi32(_mm256_min_epu32(i, most), i), lanes);
  outside |= size == 0 || !_mm256_testz_si256(beyond, beyond);
  const __m256i words =
      _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(set)), _mm256_srli_epi32(i, 5));
  const __m256i bit = _mm256_sllv_epi32(words, _mm256_andnot_si256(i, _mm256_set1_epi32(31)));
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_and_si256(bit, lanes))));
#else
  (void)set, (void)index, (void)count, (void)size, (void)outside;
  return 0;
#endif
}

// exp(x) for x <= 0, within 2 ulp, subnormal results included; exp(-inf) = 0, exp(NaN) = NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial in r, then 2^n in two steps, so that neither overflows its
// exponent. What is too small for a subnormal is not computed: where a product underflows, some processors go through
// microcode.
GTP_INLINE vfloat exp_negative(vfloat x) {
#if defined(__AVX512F__)
  const __mmask16 positive = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-104.0f), _CMP_NLT_UQ);
#else
  const vint positive = ~(x < -104.0f);
  x = vmax(splat(-104.0f), x);
#endif
  const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23: the sum holds round(x / ln 2) in its low bits
  const vfloat t = x * 1.44269504088896341f + magic;
  const vfloat n = t - magic;
  vfloat r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  vfloat p = splat(1.3814540112e-03f);
  p = p * r + 8.3687451433e-03f;
  p = p * r + 4.1668390788e-02f;
  p = p * r + 1.6666520399e-01f;
  p = p * r + 4.9999993432e-01f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_scalef_ps(positive, (__m512)p, (__m512)n);
#else
  const vint i = bits_as<vint>(t) - bits_as<vint>(magic);
  const vint i1 = i >> 1;
  const vint i2 = i - i1;
  return p * bits_as<vfloat>((i1 + 127) << 23) * bits_as<vfloat>((i2 + 127) << 23 & positive);
#endif
}

GTP_INLINE vdouble exp_negative(vdouble x) {
  const vlong positive = ~(x < -746.0);
  x = vmax(splat(-746.0), x);
  const vdouble magic = splat(6755399441055744.0);  // 1.5 * 2^52
  const vdouble t = x * 1.4426950408889634074 + magic;
  const vdouble n = t - magic;
  vdouble r = x - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  vdouble p = splat(1.6059043836821614599e-10);  // 1 / 13!
  p = p * r + 2.0876756987868098979e-9;
  p = p * r + 2.5052108385441718775e-8;
  p = p * r + 2.7557319223985890653e-7;
  p = p * r + 2.7557319223985890653e-6;
  p = p * r + 2.4801587301587301566e-5;
  p = p * r + 1.9841269841269841253e-4;
  p = p * r + 1.3888888888888889419e-3;
  p = p * r + 8.3333333333333332177e-3;
  p = p * r + 4.1666666666666664354e-2;
  p = p * r + 1.6666666666666665741e-1;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  const vlong i = bits_as<vlong>(t) - bits_as<vlong>(magic);
  // Arithmetic shift by one; 64-bit `>>` is a library loop on older sets, and halving in floating point is exact here.
  const vdouble half = n * 0.5 - 0.25 + magic;
  const vlong i1 = bits_as<vlong>(half) - bits_as<vlong>(magic);
  const vlong i2 = i - i1;
  return p * bits_as<vdouble>((i1 + 1023) << 52) * bits_as<vdouble>((i2 + 1023) << 52 & positive);
}

}  // namespace GTP_ISA
}  // namespace gtp
