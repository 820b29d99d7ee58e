// The importance of a token and the choice of those that leave, as functions that a whole block calls.
//
//   importance_i = max or mean over heads of diag, of colsum or of cls_row; or the product or the sum of the first two
//   before(j, i) = importance_j > importance_i, or the two are equal and j < i;  rank_i = #{j before i}
//
// The tokens of rank `kept` and beyond leave: no sort, and ranks that are counted do not depend on the run. NaN is
// below -inf, -0 equals 0. n^2 comparisons an image; where only who leaves is asked for and n is large, a bisection of
// the value that separates the two, n comparisons per bit.
#pragma once

#include "cuda/kernels.h"
#include "cuda/warp.cuh"

namespace gtp {
namespace cuda {

// 0 for NaN; otherwise it rises with the value, -0 as 0.
GTP_DEVICE uint32_t ordered_key(float value) {
  const uint32_t bits = bits_of(value + 0.f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Of one image: importance.{diag, colsum, cls_row}[b, h, prefix + i] over all h.
GTP_DEVICE float importance_of(const ImportanceParams& p, int64_t b, int64_t i) {
  constexpr int kBatch = 8;  // heads whose values are on their way at once
  const bool both = p.source == Source::Mixed || p.source == Source::Sum;
  const void* const of_first = p.source == Source::Cls ? p.cls_row : p.source == Source::Image ? p.colsum : p.diag;
  const int64_t at = b * p.heads * p.tokens + p.prefix + i;
  const float* const first = static_cast<const float*>(of_first) + at;
  const float* const second = static_cast<const float*>(p.colsum) + at;
  const float* const minus = static_cast<const float*>(p.diag) + at;
  const bool minus_first = p.subtract_diag && p.source == Source::Image;
  const bool minus_second = p.subtract_diag && both;
  const bool mean = p.aggregate == Aggregate::Mean;
  // The maximum propagates NaN, as torch.amax does.
  const auto combine = [mean](float total, float x) { return mean ? total + x : (x > total) | (x != x) ? x : total; };
  float total = 0, other = 0;
  for (int64_t h0 = 0; h0 < p.heads; h0 += kBatch) {
    float x[kBatch], y[kBatch], less[kBatch];
    GTP_UNROLL
    for (int k = 0; k < kBatch; ++k) {
      const int64_t offset = (h0 + k) * p.tokens;
      const bool inside = h0 + k < p.heads;
      x[k] = inside ? first[offset] : 0;
      y[k] = inside && both ? second[offset] : 0;
      less[k] = inside && (minus_first || minus_second) ? minus[offset] : 0;
    }
    GTP_UNROLL
    for (int k = 0; k < kBatch; ++k) {
      if (h0 + k >= p.heads) break;
      if (minus_first) x[k] -= less[k];
      if (minus_second) y[k] -= less[k];
      total = h0 + k == 0 ? x[k] : combine(total, x[k]);
      other = h0 + k == 0 ? y[k] : combine(other, y[k]);
    }
  }
  if (mean) {
    total /= static_cast<float>(p.heads);
    other /= static_cast<float>(p.heads);
  }
  return p.source == Source::Mixed ? total * other : p.source == Source::Sum ? total + other : total;
}

// Keys of the tokens of one image: in shared memory, padded with zeros to a multiple of 32, or where they do not fit,
// made from the importance again.
struct Keys {
  const uint32_t* shared = nullptr;
  const float* importance = nullptr;

  GTP_DEVICE uint32_t of(int i) const {
    return shared ? shared[i] : ordered_key(importance[i]);
  }
};

GTP_FORCE_INLINE int64_t padded_keys(int64_t count) {
  return (count + 31) / 32 * 32;
}

// keys[i] = ordered_key(value(i)) and the padding; for all to see after sync_block.
template <class Value>
GTP_DEVICE void fill_keys(uint32_t* keys, int count, Value value) {
  for (int i = static_cast<int>(threadIdx.x); i < padded_keys(count); i += static_cast<int>(blockDim.x)) {
    keys[i] = i < count ? ordered_key(value(i)) : 0;
  }
}

struct alignas(16) FourKeys {
  uint32_t key[4];
};

// How many of the tokens first .. first + count come before token i; keys: theirs, `count` and `first` multiples of 32.
// The 32 lanes of a warp have 32 tokens that follow each other, the first of them a multiple of 32. Padding is NaN at a
// higher index: before nobody.
GTP_DEVICE int count_before(const uint32_t* keys, int first, int count, int i, uint32_t key) {
  const auto* const fours = reinterpret_cast<const FourKeys*>(keys);
  const int of_warp = i - lane_id() - first;
  const int lower = of_warp < 0 ? 0 : of_warp < count ? of_warp : count;
  const int higher = of_warp + 32 < 0 ? 0 : of_warp + 32 < count ? of_warp + 32 : count;
  int before = 0;
  for (int j = 0; j < lower / 4; ++j) {
    const FourKeys four = fours[j];
    GTP_UNROLL
    for (int k = 0; k < 4; ++k) before += four.key[k] >= key;
  }
  for (int j = lower; j < higher; ++j) before += keys[j] > key || (keys[j] == key && first + j < i);
  for (int j = higher / 4; j < count / 4; ++j) {
    const FourKeys four = fours[j];
    GTP_UNROLL
    for (int k = 0; k < 4; ++k) before += four.key[k] > key;
  }
  return before;
}

// The sum over the block of a value that is the same in all lanes of a warp, and what the warps before this one have of
// it. scratch: 64 integers of shared memory; `turn` rises by one from call to call.
struct BlockSum {
  int before, total;
};
GTP_DEVICE BlockSum sum_warps(int value, int* scratch, int turn) {
  int* const of_warp = scratch + turn % 2 * 32;
  const int warps = static_cast<int>(blockDim.x) / kLanes;
  if (lane_id() == 0) of_warp[warp_id()] = value;
  sync_block();
  BlockSum sum{0, 0};
  for (int w = 0; w < warps; ++w) {
    sum.before += w < warp_id() ? of_warp[w] : 0;
    sum.total += of_warp[w];
  }
  return sum;
}

// From here on a token stays where its key, followed by its index counted backwards, is at least the value returned.
GTP_DEVICE int index_bits(int count) {
  return 32 - leading_zeros(static_cast<uint32_t>(count));
}
GTP_DEVICE uint64_t key_and_index(const Keys& keys, int i, int count) {
  return static_cast<uint64_t>(keys.of(i)) << index_bits(count) | static_cast<uint32_t>(count - 1 - i);
}
GTP_DEVICE uint64_t lowest_that_stays(const Keys& keys, int count, int kept, int* scratch, int& turn) {
  uint64_t lowest = 0;
  for (int bit = 31 + index_bits(count); bit >= 0; --bit) {
    const uint64_t candidate = lowest | uint64_t{1} << bit;
    int above = 0;
    for (int i0 = 0; i0 < count; i0 += static_cast<int>(blockDim.x)) {
      const int i = i0 + static_cast<int>(threadIdx.x);
      above += count_bits(ballot(i < count && key_and_index(keys, i, count) >= candidate));
    }
    if (sum_warps(above, scratch, turn++).total >= kept) lowest = candidate;
  }
  return lowest;
}

// place(i, position) for every token of an image: positions below `kept` are those that stay, by falling importance or
// by index, and those from `kept` on the ones that leave, in the same order. scratch: 64 integers of shared memory. All
// threads of a block, after sync_block.
constexpr int kCounted = 512;  // tokens up to which the order by index counts ranks too
template <class Place>
GTP_DEVICE void select_in_block(const Keys& keys, int count, int kept, bool by_index, int* scratch, Place place) {
  const int threads = static_cast<int>(blockDim.x);
  int turn = 0, stayed = 0;
  const bool counted = keys.shared && (!by_index || count <= kCounted);
  const uint64_t lowest = counted ? 0 : lowest_that_stays(keys, count, kept, scratch, turn);
  for (int i0 = 0; i0 < count; i0 += threads) {
    const int i = i0 + static_cast<int>(threadIdx.x);
    const bool inside = i < count;
    int rank = 0;
    bool stays = false;
    if (counted) {
      rank = count_before(keys.shared, 0, static_cast<int>(padded_keys(count)), i, inside ? keys.shared[i] : 0);
      stays = inside && rank < kept;
    } else {
      stays = inside && key_and_index(keys, i, count) >= lowest;
    }
    if (!by_index) {
      if (inside) place(i, rank);
      continue;
    }
    const unsigned votes = ballot(stays);
    const BlockSum sum = sum_warps(count_bits(votes), scratch, turn++);
    const int before = stayed + sum.before + count_bits(votes & ((1u << lane_id()) - 1));
    if (inside) place(i, stays ? before : kept + i - before);
    stayed += sum.total;
  }
}

}  // namespace cuda
}  // namespace gtp
