// The exact rank-th smallest of a map, by the bit patterns of its values, which are not negative: as unsigned integers
// those are in the order of the values, and NaN is above all. A place that is no value of the map is kNothing, the
// highest pattern, or in registers zero, the lowest.
//
// A sample of the map, counted twice (over all floats, then over the few bins that the rank can be in), gives a bracket
// [low, high) that holds the rank-th value with all but a few in a thousand; one pass counts what is below and collects
// what is inside, and a radix selection finds the value there. Where the bracket misses or holds too many, the same
// selection runs over the whole map.
#pragma once

#include <cmath>

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

// The bins of a histogram, eight to a lane, as a warp holds them.
struct Bins {
  int upto[kBins / kLanes];  // entries in this lane's bins up to each of them
  int before;                // and in those of lower lanes
};
GTP_DEVICE Bins load_bins(const int* histogram) {
  struct alignas(16) Four {
    int v[4];
  };
  Bins b;
  int count = 0;
  GTP_UNROLL
  for (int i = 0; i < kBins / kLanes; i += 4) {
    const Four four = reinterpret_cast<const Four*>(histogram)[(lane_id() * (kBins / kLanes) + i) / 4];
    GTP_UNROLL
    for (int j = 0; j < 4; ++j) b.upto[i + j] = count += four.v[j];
  }
  b.before = scan_lanes(count) - count;
  return b;
}

// The bin that holds the rank-th (from 1) entry, and how many are in lower bins; by one warp. A rank below 1 gives bin
// -1, one above the total kBins.
struct Found {
  int bin, below;
};
GTP_DEVICE Found find_rank(const Bins& b, int rank) {
  constexpr int kEach = kBins / kLanes;
  const int here = rank - b.before;
  int bin = lane_id() * kEach, below = 0;
  GTP_UNROLL
  for (int i = 0; i < kEach; ++i) {
    bin += b.upto[i] < here;
    below = b.upto[i] < here ? b.upto[i] : below;
  }
  const unsigned holder = ballot(here > 0 && here <= b.upto[kEach - 1]);
  const int from = holder ? lowest_bit(holder) : kLanes - 1;  // beyond the total the last lane counts up to it
  bin = shuffle(bin, from);
  below = shuffle(b.before + below, from);
  if (rank < 1) return {-1, 0};
  return {bin, below};
}

// Where in a sample of `sampled` of `count` values the rank-th of these is to be found, with three standard deviations
// on both sides; a rank of the sample below 1 or above `sampled` says that the bracket is open on that side.
struct SampleRanks {
  int low = 0, high = 0;
};
inline SampleRanks sample_ranks(int64_t rank, int64_t count, int64_t sampled) {
  const double share = static_cast<double>(rank) / static_cast<double>(count);
  const double centre = share * static_cast<double>(sampled);
  const double margin = 3 * std::sqrt(centre * (1 - share)) + 2;
  return {static_cast<int>(centre - margin), static_cast<int>(centre + margin) + 1};
}

// The range that the first histogram leaves: keys in [base, base + (kBins << shift)), kBins bins of 2^shift; `below`
// sampled keys are lower.
struct Range {
  uint32_t base;
  int shift, below;
};
GTP_DEVICE Range fine_range(const int* coarse, SampleRanks ranks) {
  const Bins bins = load_bins(coarse);
  const Found low = find_rank(bins, ranks.low), high = find_rank(bins, ranks.high);
  const int first = low.bin < 0 ? 0 : low.bin < kBins ? low.bin : kBins - 1;
  const int last = high.bin < 0 ? 0 : high.bin < kBins ? high.bin : kBins - 1;
  // Where the range is of one bin, 2^22 keys in 2^8 bins.
  const int width = 32 - leading_zeros(static_cast<uint32_t>(last - first));
  return {static_cast<uint32_t>(first) << kCoarseShift, kCoarseShift - 8 + width, low.below};
}
GTP_DEVICE int fine_bin(uint32_t key, const Range& range) {
  const uint32_t bin = (key - range.base) >> range.shift;  // of a lower key, or of kNothing, beyond all bins
  return bin < kBins ? static_cast<int>(bin) : -1;
}

// [low, high), low < high, from the histogram of the range; by one warp, as is the range.
struct Bracket {
  uint32_t low, high;
};
GTP_DEVICE Bracket bracket_of(const Range& range, const int* fine, SampleRanks ranks) {
  const Bins bins = load_bins(fine);
  const Found low = find_rank(bins, ranks.low - range.below), high = find_rank(bins, ranks.high - range.below);
  Bracket b;
  b.low = ranks.low < 1 ? 0 : low.bin < 0 ? range.base : range.base + (static_cast<uint32_t>(low.bin) << range.shift);
  b.high = high.bin >= kBins ? kNothing
                             : range.base + (static_cast<uint32_t>(high.bin < 0 ? 1 : high.bin + 1) << range.shift);
  return b;
}

// The rank-th smallest of the keys that each(f) hands to f(key), all of which are in [base, base + 2^bits), or bits is
// 32 and base 0; by all threads of a block. `histogram` is zero before and after. state: 4 ints, the last one zero
// before. `few`, where it is given: room for kLanes keys, among which the last steps are taken.
//
// Keys outside of the range left are beyond all bins; kNothing is last, where no rank comes to.
template <class Each>
GTP_DEVICE uint32_t radix_select(const Each& each, uint32_t base, int bits, int rank, int* histogram, int* state,
                                 uint32_t* few = nullptr) {
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
      const Found found = find_rank(load_bins(histogram), rank);
      if (lane_id() == 0) {
        state[0] = found.bin;
        state[1] = found.below;
        state[2] = histogram[found.bin];
      }
      sync_warp();
      for (int i = lane_id(); i < kBins; i += kLanes) histogram[i] = 0;
    }
    sync_block();
    base += static_cast<uint32_t>(state[0]) << shift;
    rank -= state[1];
    bits = shift;
    const int left = state[2];
    if (!few || bits == 0 || left > kLanes) continue;
    each([&](uint32_t key) {
      if (key - base < 1u << bits) few[atomic_add(state + 3, 1)] = key;
    });
    sync_block();
    // The key with rank - 1 before it, equal ones by their places.
    const uint32_t key = lane_id() < left ? few[lane_id()] : kNothing;
    int before = 0;
    GTP_NO_UNROLL
    for (int i = 0; i < left; ++i) {
      const uint32_t other = few[i];
      before += other < key || (other == key && i < lane_id());
    }
    return shuffle(key, lowest_bit(ballot(before == rank - 1)));
  }
  return base;
}

}  // namespace cuda
}  // namespace gtp
