// The exact rank-th smallest of a map, by the bit patterns of its values, which are not negative: as unsigned integers
// those are in the order of the values, and NaN is above all. A place that is no value of the map is kNothing, the
// highest pattern.
//
// A sample of the map, counted twice (over all floats, then over the few bins that the rank can be in), gives a bracket
// [low, high) that holds the rank-th value with all but a few in a thousand; one pass counts what is below and collects
// what is inside, and a radix selection finds the value there. Where the bracket misses or holds too many, the same
// selection runs over the whole map.
#pragma once

#include "cuda/warp.cuh"

namespace gtp {
namespace cuda {

constexpr uint32_t kNothing = 0xffffffffu;
constexpr int kBins = 256;
constexpr int kCoarseShift = 22;  // two bins an octave; values up to 1 are in the first 255

GTP_DEVICE int coarse_bin(uint32_t key) {
  const uint32_t bin = key >> kCoarseShift;
  return static_cast<int>(bin < kBins ? bin : kBins - 1);
}

// The bin of a histogram that holds the rank-th (from 1) entry, and how many are in lower bins; by one warp. A rank
// below 1 gives bin -1, one above the total kBins.
struct Found {
  int bin, below;
};
GTP_DEVICE Found find_rank(const int* histogram, int rank) {
  constexpr int kEach = kBins / kLanes;
  int count = 0;
  GTP_UNROLL
  for (int i = 0; i < kEach; ++i) count += histogram[lane_id() * kEach + i];
  const int last = scan_lanes(count);
  int bin = 0, below = 0;
  if (rank > last - count && rank <= last) {
    below = last - count;
    for (int i = 0; i < kEach; ++i) {
      const int here = histogram[lane_id() * kEach + i];
      bin = lane_id() * kEach + i;
      if (rank <= below + here) break;
      below += here;
    }
  }
  const unsigned holder = ballot(rank > last - count && rank <= last);
  const int total = shuffle(last, kLanes - 1);
  const int from = holder ? lowest_bit(holder) : 0;
  bin = shuffle(bin, from);
  below = shuffle(below, from);
  if (rank < 1) return {-1, 0};
  if (rank > total) return {kBins, total};
  return {bin, below};
}
GTP_DEVICE int total_of(const int* histogram) {
  int count = 0;
  for (int i = lane_id(); i < kBins; i += kLanes) count += histogram[i];
  return sum_lanes(count);
}

// Where in a sample of `total` values the rank-th of `count` is to be found, with three standard deviations on both
// sides; a rank of the sample below 1 or above `total` says that the bracket is open on that side.
struct SampleRanks {
  int low, high;
};
GTP_DEVICE SampleRanks sample_ranks(int64_t rank, int64_t count, int total) {
  const float share = static_cast<float>(rank) / static_cast<float>(count);
  const float centre = share * static_cast<float>(total);
  const float margin = 3.0f * sqrtf(centre * (1.0f - share)) + 2.0f;
  return {static_cast<int>(centre - margin), static_cast<int>(centre + margin) + 1};
}

// The range that the first histogram leaves: keys in [base, base + (kBins << shift)), kBins bins of 2^shift; `below`
// sampled keys are lower.
struct Range {
  uint32_t base;
  int shift, below;
};
GTP_DEVICE Range fine_range(const int* coarse, SampleRanks ranks) {
  const Found low = find_rank(coarse, ranks.low), high = find_rank(coarse, ranks.high);
  const int first = low.bin < 0 ? 0 : low.bin < kBins ? low.bin : kBins - 1;
  const int last = high.bin < 0 ? 0 : high.bin < kBins ? high.bin : kBins - 1;
  // Where the range is of one bin, 2^22 keys in 2^8 bins.
  const int width = 32 - leading_zeros(static_cast<uint32_t>(last - first));
  return {static_cast<uint32_t>(first) << kCoarseShift, kCoarseShift - 8 + width, low.bin < 0 ? 0 : low.below};
}
GTP_DEVICE int fine_bin(uint32_t key, const Range& range) {
  const uint32_t bin = (key - range.base) >> range.shift;  // of a lower key, or of kNothing, beyond all bins
  return bin < kBins ? static_cast<int>(bin) : -1;
}

// [low, high) from both histograms.
struct Bracket {
  uint32_t low, high;
};
GTP_DEVICE Bracket bracket_of(const int* fine, const Range& range, SampleRanks ranks, int total) {
  const Found low = find_rank(fine, ranks.low - range.below), high = find_rank(fine, ranks.high - range.below);
  Bracket b;
  b.low = ranks.low < 1 ? 0 : low.bin < 0 ? range.base : range.base + (static_cast<uint32_t>(low.bin) << range.shift);
  b.high = ranks.high > total || high.bin >= kBins
               ? kNothing
               : range.base + (static_cast<uint32_t>(high.bin < 0 ? 1 : high.bin + 1) << range.shift);
  return b;
}

// The rank-th smallest of the keys that each(f) hands to f(key), all of which are in [base, base + 2^bits), or bits is
// 32 and base 0; by all threads of a block. `histogram` is zero before and after. state: 2 ints.
//
// Keys outside of the range left are beyond all bins; kNothing is last, where no rank comes to.
template <class Each>
GTP_DEVICE uint32_t radix_select(const Each& each, uint32_t base, int bits, int rank, int* histogram, int* state) {
  GTP_NO_UNROLL
  while (bits > 0) {
    const int shift = bits > 8 ? bits - 8 : 0;
    const uint32_t width = bits - shift == 8 ? kBins : 1u << (bits - shift);
    each([&](uint32_t key) {
      const uint32_t bin = (key - base) >> shift;
      if (bin < width) atomic_add(histogram + bin, 1);
    });
    sync_block();
    if (warp_id() == 0) {
      const Found found = find_rank(histogram, rank);
      sync_warp();
      for (int i = lane_id(); i < kBins; i += kLanes) histogram[i] = 0;
      if (lane_id() == 0) {
        state[0] = found.bin;
        state[1] = found.below;
      }
    }
    sync_block();
    base += static_cast<uint32_t>(state[0]) << shift;
    rank -= state[1];
    bits = shift;
  }
  return base;
}

}  // namespace cuda
}  // namespace gtp
