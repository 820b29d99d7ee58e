// The machine of csrc/cuda/warp.cuh on the host, for tests: the threads of a block are fibers on one host thread.
//
// A lane runs until it meets a collective of its warp, a barrier of the block, or its end; a collective happens when
// all 32 lanes have come to the same one, of the same kind at the same line (in a function that several places call,
// the line there). In which order lanes and warps run between two such points is drawn from a seed (GTP_EMULATED_SEED),
// so that a missing barrier shows. Shared memory begins as NaN, and ends with a guard; a copy_async lands at once or
// when it is waited for, which the seed decides. Compiled with GTP_EMULATED_RACES, a race ends the process whatever the
// order (emulated_races.h). What is not emulated: the rounding inside a tensor core (here the sum of 16 products is
// exact and rounded once), and time.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "emulated_races.h"

#define GTP_GLOBAL(...) static void
#define GTP_DEVICE inline
#define GTP_HOST_DEVICE
#define GTP_CONSTANT const
#define GTP_SHARED(name) unsigned char* const name = ::gtp::emulated::block().shared
#define GTP_UNROLL
#define GTP_NO_UNROLL

namespace gtp {
namespace emulated {

struct Index {
  unsigned x, y, z;
};

enum class Wait { None, Warp, Block, Done };
enum Kind { kSync = 1, kShuffle, kBallot, kMatrices, kMatricesTransposed, kMultiplyBFloat16, kMultiplyFloat16 };

// What a lane brings to a collective, and takes from it.
struct Offer {
  int kind = 0, line = 0;
  uint64_t value[4] = {};
  float c[4] = {};
  const void* address = nullptr;
};

struct Lane {
  ucontext_t context;
  jmp_buf buffer;
  bool started = false;
  std::unique_ptr<char[]> stack;
  Index index{};
  Wait wait = Wait::None;
  Offer offer;
  struct Copy {
    void* target;
    unsigned char data[16];
    bool landed;
  };
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s\n", what);
  std::abort();
}

class Block {
 public:
  static constexpr size_t kStack = 256 * 1024, kGuard = 4096;
  static constexpr unsigned char kPoison = 0xff;

  Index index{}, size{}, grid{};
  unsigned char* shared = nullptr;
  Lane* lane = nullptr;
  std::mt19937* random = nullptr;

  // One block of the grid: body(), for every thread.
  void run(int threads, size_t shared_bytes, const std::function<void()>& body, std::mt19937& order) {
    if (threads % 32 || threads > 1024 || threads <= 0) fail("a block must have 32 to 1,024 threads, whole warps");
    memory_.assign(shared_bytes + kGuard + 64, kPoison);
    shared = memory_.data() + (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) % 64;
    body_ = &body;
    random = &order;
    size = {static_cast<unsigned>(threads), 1, 1};
    races().begin_block(shared, shared_bytes);
    barriers_ = 0;
    warp_barriers_.assign(static_cast<size_t>(threads / 32), 0);
    while (lanes_.size() < static_cast<size_t>(threads)) {
      lanes_.push_back(std::make_unique<Lane>());
      lanes_.back()->stack.reset(new char[kStack]);
    }
    for (int i = 0; i < threads; ++i) {
      Lane& l = *lanes_[i];
      l.started = false;
      l.wait = Wait::None;
      l.index = {static_cast<unsigned>(i), 0, 0};
      l.groups.clear();
      l.open.clear();
    }
    const int warps = threads / 32;
    std::vector<int> of_warps(warps), of_lanes(32);
    for (int w = 0; w < warps; ++w) of_warps[w] = w;
    for (int l = 0; l < 32; ++l) of_lanes[l] = l;
    for (bool done = false; !done;) {
      std::shuffle(of_warps.begin(), of_warps.end(), order);
      for (int w : of_warps) run_warp(w, of_lanes, order);
      done = true;
      bool at_barrier = true;
      for (int i = 0; i < threads; ++i) {
        done &= lanes_[i]->wait == Wait::Done;
        at_barrier &= lanes_[i]->wait == Wait::Block;
      }
      if (!done && !at_barrier) fail("some threads wait at a barrier of the block that others never reach");
      if (!done) {
        for (int i = 0; i < threads; ++i) lanes_[i]->wait = Wait::None;
        ++barriers_;
      }
    }
    for (size_t i = 0; i < kGuard; ++i) {
      if (shared[shared_bytes + i] != kPoison) fail("written beyond shared memory");
    }
  }

  void continue_turn() {
    const unsigned thread = lane->index.x;
    races().begin_turn(thread, barriers_, warp_barriers_[thread / 32], lane->stack.get(), kStack);
  }
  // Leaves this lane until what it waits for has happened.
  void pause(Wait wait) {
    races().end_turn();
    Lane* const self = lane;
    self->wait = wait;
    if (_setjmp(self->buffer) == 0) _longjmp(scheduler_, 1);
  }

 private:
  void run_warp(int warp, std::vector<int>& order_of_lanes, std::mt19937& order) {
    for (;;) {
      std::shuffle(order_of_lanes.begin(), order_of_lanes.end(), order);
      int waiting = 0;
      for (int l : order_of_lanes) {
        Lane& next = *lanes_[warp * 32 + l];
        if (next.wait == Wait::None) resume(next);
        waiting += next.wait == Wait::Warp;
      }
      if (waiting == 0) return;  // at a barrier of the block, or done
      if (waiting < 32) fail("a collective that not all lanes of the warp take part in");
      complete(&lanes_[warp * 32]);
      if (lanes_[warp * 32]->offer.kind == kSync) ++warp_barriers_[warp];
      for (int l = 0; l < 32; ++l) lanes_[warp * 32 + l]->wait = Wait::None;
    }
  }

  void resume(Lane& next) {
    lane = &next;
    if (_setjmp(scheduler_) != 0) return;
    if (next.started) {
      continue_turn();
      _longjmp(next.buffer, 1);
    }
    next.started = true;
    getcontext(&next.context);
    next.context.uc_stack.ss_sp = next.stack.get();
    next.context.uc_stack.ss_size = kStack;
    next.context.uc_link = nullptr;
    makecontext(&next.context, reinterpret_cast<void (*)()>(&Block::entry), 0);
    setcontext(&next.context);
  }

  static void entry();
  static void complete(std::unique_ptr<Lane>* lanes);

  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<unsigned char> memory_;
  uint32_t barriers_ = 0;  // met by the block so far
  std::vector<uint32_t> warp_barriers_;
  const std::function<void()>* body_ = nullptr;
  jmp_buf scheduler_;
};

inline Block& block() {
  static Block the;
  return the;
}

inline void Block::entry() {
  block().continue_turn();
  (*block().body_)();
  for (const auto& group : block().lane->groups) {
    if (!group.empty()) fail("a thread ends with an asynchronous copy that it has not waited for");
  }
  if (!block().lane->open.empty()) fail("a thread ends with an asynchronous copy that it has not committed");
  block().pause(Wait::Done);
}

inline float widened(uint16_t bits, bool bfloat) {
  if (bfloat) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

// All 32 lanes have made their offers: each gets what it came for.
inline void Block::complete(std::unique_ptr<Lane>* lanes) {
  const int kind = lanes[0]->offer.kind;
  for (int l = 1; l < 32; ++l) {
    if (lanes[l]->offer.kind != kind || lanes[l]->offer.line != lanes[0]->offer.line) {
      fail("the lanes of a warp are at different collectives");
    }
  }
  Offer offers[32];
  for (int l = 0; l < 32; ++l) offers[l] = lanes[l]->offer;
  switch (kind) {
    case kSync:
      return;
    case kShuffle:  // value[0] from the lane value[1]
      for (int l = 0; l < 32; ++l) lanes[l]->offer.value[0] = offers[offers[l].value[1] % 32].value[0];
      return;
    case kBallot: {
      uint64_t votes = 0;
      for (int l = 0; l < 32; ++l) votes |= (offers[l].value[0] & 1) << l;
      for (int l = 0; l < 32; ++l) lanes[l]->offer.value[0] = votes;
      return;
    }
    case kMatrices:
    case kMatricesTransposed:
      for (int m = 0; m < 4; ++m) {
        uint16_t matrix[8][8];
        for (int row = 0; row < 8; ++row) {
          if (reinterpret_cast<uintptr_t>(offers[m * 8 + row].address) % 16) fail("a matrix row is not aligned");
          std::memcpy(matrix[row], offers[m * 8 + row].address, 16);
        }
        for (int l = 0; l < 32; ++l) {
          const int g = l / 4, t = 2 * (l % 4);
          const uint16_t low = kind == kMatrices ? matrix[g][t] : matrix[t][g];
          const uint16_t high = kind == kMatrices ? matrix[g][t + 1] : matrix[t + 1][g];
          lanes[l]->offer.value[m] = low | static_cast<uint32_t>(high) << 16;
        }
      }
      return;
    case kMultiplyBFloat16:
    case kMultiplyFloat16: {  // value[0], value[1]: a in pairs of registers; value[2]: b
      const bool bfloat = kind == kMultiplyBFloat16;
      float a[16][16], b[16][8];
      for (int l = 0; l < 32; ++l) {
        const int g = l / 4, t = 2 * (l % 4);
        for (int r = 0; r < 4; ++r) {
          const uint32_t pair = static_cast<uint32_t>(offers[l].value[r / 2] >> (32 * (r % 2)));
          const int row = g + 8 * (r % 2), k = t + 8 * (r / 2);
          a[row][k] = widened(static_cast<uint16_t>(pair), bfloat);
          a[row][k + 1] = widened(static_cast<uint16_t>(pair >> 16), bfloat);
        }
        for (int r = 0; r < 2; ++r) {
          const uint32_t pair = static_cast<uint32_t>(offers[l].value[2] >> (32 * r));
          b[t + 8 * r][g] = widened(static_cast<uint16_t>(pair), bfloat);
          b[t + 8 * r + 1][g] = widened(static_cast<uint16_t>(pair >> 16), bfloat);
        }
      }
      for (int l = 0; l < 32; ++l) {
        const int g = l / 4, t = 2 * (l % 4);
        for (int r = 0; r < 4; ++r) {
          const int row = g + 8 * (r / 2), column = t + r % 2;
          double sum = offers[l].c[r];
          for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
          lanes[l]->offer.c[r] = static_cast<float>(sum);
        }
      }
      return;
    }
    default:
      fail("an unknown collective");
  }
}

// Runs every block of a grid, one after the other, in an order drawn from the seed too.
inline void run_grid(unsigned blocks_x, unsigned blocks_y, int threads, size_t shared_bytes,
                     const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const char* seed = std::getenv("GTP_EMULATED_SEED");
  std::mt19937 order(seed ? static_cast<unsigned>(std::atoi(seed)) : 1u);
  std::vector<uint64_t> blocks(static_cast<uint64_t>(blocks_x) * blocks_y);
  for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), order);
  races().begin_launch();
  Block& b = block();
  b.grid = {blocks_x, blocks_y, 1};
  for (uint64_t i : blocks) {
    b.index = {static_cast<unsigned>(i % blocks_x), static_cast<unsigned>(i / blocks_x), 0};
    b.run(threads, shared_bytes, body, order);
  }
}

}  // namespace emulated

namespace cuda {

#define threadIdx (::gtp::emulated::block().lane->index)
#define blockIdx (::gtp::emulated::block().index)
#define blockDim (::gtp::emulated::block().size)
#define gridDim (::gtp::emulated::block().grid)

// The emulation runs and not a thread of the GPU, until the end of a scope.
class Untracked {
 public:
  Untracked() {
    emulated::races().end_turn();
  }
  ~Untracked() {
    emulated::block().continue_turn();
  }
};

inline emulated::Offer& collective(const emulated::Offer& offer) {
  const Untracked untracked;
  emulated::Block& block = emulated::block();
  emulated::Lane* const self = block.lane;
  self->offer = offer;
  block.pause(emulated::Wait::Warp);
  return self->offer;
}

inline void sync_block() {
  emulated::block().pause(emulated::Wait::Block);
}
inline void sync_warp(int line = __builtin_LINE()) {
  emulated::Offer offer;
  offer.kind = emulated::kSync, offer.line = line;
  collective(offer);
}
template <class T>
T shuffle(T value, int lane, int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= 8);
  emulated::Offer offer;
  offer.kind = emulated::kShuffle, offer.line = line;
  std::memcpy(&offer.value[0], &value, sizeof(T));
  offer.value[1] = static_cast<uint64_t>(lane & 31);
  T result;
  std::memcpy(&result, &collective(offer).value[0], sizeof(T));
  return result;
}
template <class T>
T shuffle_xor(T value, int mask, int line = __builtin_LINE()) {
  return shuffle(value, static_cast<int>(threadIdx.x % 32) ^ mask, line);
}
template <class T>
T shuffle_up(T value, int delta, int line = __builtin_LINE()) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return shuffle(value, lane >= delta ? lane - delta : lane, line);
}
inline unsigned ballot(bool vote, int line = __builtin_LINE()) {
  emulated::Offer offer;
  offer.kind = emulated::kBallot, offer.line = line;
  offer.value[0] = vote;
  return static_cast<unsigned>(collective(offer).value[0]);
}
// How many there were: a test reads off them which way a kernel took.
inline uint64_t atomic_adds = 0;
inline int atomic_add(int* target, int value) {
  emulated::races().access(target, sizeof *target, emulated::Access::Atomic);
  const Untracked untracked;
  ++atomic_adds;
  const int before = *target;
  *target += value;
  return before;
}
inline int atomic_exchange(int* target, int value) {
  emulated::races().access(target, sizeof *target, emulated::Access::Atomic);
  const Untracked untracked;
  const int before = *target;
  *target = value;
  return before;
}
inline uint32_t atomic_max(uint32_t* target, uint32_t value) {
  emulated::races().access(target, sizeof *target, emulated::Access::Atomic);
  const Untracked untracked;
  const uint32_t before = *target;
  *target = std::max(before, value);
  return before;
}

inline void copy_async(void* target, const void* source, bool valid) {
  if (reinterpret_cast<uintptr_t>(target) % 16) emulated::fail("copy_async: the target is not aligned");
  if (valid && reinterpret_cast<uintptr_t>(source) % 16) emulated::fail("copy_async: the source is not aligned");
  emulated::races().begin_copy(target, source, valid);
  const Untracked untracked;
  emulated::Lane::Copy copy{target, {}, (*emulated::block().random)() % 2 != 0};
  if (valid) std::memcpy(copy.data, source, 16);
  if (copy.landed) std::memcpy(target, copy.data, 16);
  emulated::block().lane->open.push_back(copy);
}
inline void commit_copies() {
  const Untracked untracked;
  emulated::Lane* const lane = emulated::block().lane;
  lane->groups.push_back(std::move(lane->open));
  lane->open.clear();
}
template <int kPending>
void wait_copies() {
  auto& groups = emulated::block().lane->groups;
  while (groups.size() > kPending) {
    for (const auto& copy : groups.front()) {
      emulated::races().end_copy(copy.target);
      const Untracked untracked;
      if (!copy.landed) std::memcpy(copy.target, copy.data, 16);
    }
    const Untracked untracked;
    groups.erase(groups.begin());
  }
}

using Address = const unsigned char*;
inline Address shared_address(const void* pointer) {
  return static_cast<Address>(pointer);
}
inline void count_below(int& count, uint32_t key, uint32_t limit) {
  count += key < limit;
}
inline void append_within(Address& end, uint32_t key, uint32_t low, uint32_t width) {
  if (key - low >= width) return;
  std::memcpy(const_cast<unsigned char*>(end), &key, 4);
  end += 4;
}
template <bool kTranspose>
void load_matrices(uint32_t (&r)[4], Address row, int line = __builtin_LINE()) {
  emulated::Offer offer;
  offer.kind = kTranspose ? emulated::kMatricesTransposed : emulated::kMatrices, offer.line = line;
  offer.address = row;
  emulated::races().access(row, 16, emulated::Access::Read);
  const emulated::Offer& result = collective(offer);
  for (int m = 0; m < 4; ++m) r[m] = static_cast<uint32_t>(result.value[m]);
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int kind, int line) {
  emulated::Offer offer;
  offer.kind = kind, offer.line = line;
  offer.value[0] = a[0] | static_cast<uint64_t>(a[1]) << 32;
  offer.value[1] = a[2] | static_cast<uint64_t>(a[3]) << 32;
  offer.value[2] = b0 | static_cast<uint64_t>(b1) << 32;
  for (int i = 0; i < 4; ++i) offer.c[i] = c[i];
  const emulated::Offer& result = collective(offer);
  for (int i = 0; i < 4; ++i) c[i] = result.c[i];
}
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16,
                     int line = __builtin_LINE()) {
  multiply(c, a, b0, b1, emulated::kMultiplyBFloat16, line);
}
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Float16,
                     int line = __builtin_LINE()) {
  multiply(c, a, b0, b1, emulated::kMultiplyFloat16, line);
}

template <class T>
T forget(T x) {
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint16_t rounded(float x, BFloat16) {
  const uint32_t bits = bits_of(x);
  if (isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t rounded(float x, Float16) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
template <class T>
uint32_t pack(float low, float high, T type) {
  return rounded(low, type) | static_cast<uint32_t>(rounded(high, type)) << 16;
}
inline float widen(uint16_t bits, BFloat16) {
  return emulated::widened(bits, true);
}
inline float widen(uint16_t bits, Float16) {
  return emulated::widened(bits, false);
}
inline float exp2_fast(float x) {
  return x < -126 ? 0 : exp2f(x);
}
inline float rsqrt_fast(float x) {
  return 1 / sqrtf(x);
}
inline int leading_zeros(uint32_t x) {
  return x ? __builtin_clz(x) : 32;
}
inline int count_bits(uint32_t x) {
  return __builtin_popcount(x);
}
inline int lowest_bit(uint32_t x) {
  return __builtin_ctz(x);
}

}  // namespace cuda
}  // namespace gtp
