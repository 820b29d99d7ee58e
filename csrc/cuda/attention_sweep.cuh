// The attention of any number of tokens: the map is computed again by every sweep over it, from the same products in
// the same order, so that all of them see the same bits. A block takes 64 queries of one (image, head), 16 a warp.
//
//   statistics   the maximum and 1 / sum of each row; of its part of the sample, the first histogram
//   fine         the second histogram of the sample
//   collect      how many values are below the bracket, and those inside
//   select       T of each head: among the candidates, or by a search of its whole map
//   output       out, diag, cls_row, and the column sums of each block of queries
//   columns      their sums in order
//
// Without a threshold statistics, output and columns. Each sweep reads q once and k (and v) once for every 64 queries.
// 2 N^2 d FLOPs a sweep, twice that in output.
#pragma once

#include <algorithm>

#include "cuda/attention_map.cuh"
#include "cuda/attention_threshold.cuh"

namespace gtp {
namespace cuda {

constexpr int kSweepWarps = 4, kSweepThreads = kLanes * kSweepWarps;
constexpr int kSweepRows = 16 * kSweepWarps;  // queries of a block
constexpr int kSweepKeys = 64;                // keys in shared memory at a time

// What the sweeps leave in memory for each other, of all heads.
struct Workspace {
  float* stats;          // [heads, 2, N]: maximum and 1 / sum, of logits to the base 2
  int* coarse;           // [heads, kBins]
  int* fine;             // [heads, kBins]
  int* counts;           // [heads, 2]: below the bracket, inside
  float* threshold;      // [heads]
  float* sums;           // [heads, row_blocks, N]
  uint32_t* candidates;  // [heads, room]
};

// Bytes of the arrays, or with a base their places: the counters, which begin at zero, are first.
inline GTP_HOST_DEVICE size_t place_workspace(const MapParams& p, unsigned char* base, Workspace& w, size_t& counters) {
  const size_t heads = static_cast<size_t>(p.heads), tokens = static_cast<size_t>(p.a.tokens);
  const bool ranked = p.a.rank > 0;
  size_t at = 0;
  const auto take = [&](size_t bytes) {
    unsigned char* const place = base + at;
    at += (bytes + 15) / 16 * 16;
    return place;
  };
  w.coarse = reinterpret_cast<int*>(take(ranked ? heads * kBins * 4 : 0));
  w.fine = reinterpret_cast<int*>(take(ranked ? heads * kBins * 4 : 0));
  w.counts = reinterpret_cast<int*>(take(ranked ? heads * 2 * 4 : 0));
  counters = at;
  w.threshold = reinterpret_cast<float*>(take(ranked ? heads * 4 : 0));
  w.stats = reinterpret_cast<float*>(take(heads * 2 * tokens * 4));
  w.sums = reinterpret_cast<float*>(take(heads * static_cast<size_t>(p.row_blocks) * tokens * 4));
  w.candidates = reinterpret_cast<uint32_t*>(take(ranked ? heads * static_cast<size_t>(p.room) * 4 : 0));
  return at;
}

template <int kSize>
struct Sweep {
  using Tiles = Tile<kSize>;
  static constexpr size_t kQueries = Tiles::bytes(kSweepRows), kKeys = Tiles::bytes(kSweepKeys);
  static constexpr size_t kScales = sizeof(float) * 2 * kSweepKeys;
  static constexpr size_t kScratch = sizeof(int) * (kBins + 8 + kLanes);
  static constexpr size_t kSums = sizeof(float) * kSweepWarps * kSweepKeys;
  static constexpr int kHeld = 2048;  // candidates of a block that go to memory together
  // q, k twice (one on its way), their scales, a histogram and a state.
  static constexpr size_t kBytes = kQueries + 2 * kKeys + kScales + kScratch;
  static constexpr size_t kCollectBytes = kQueries + 2 * kKeys + kScales + sizeof(int) * (kHeld + 4);
  static constexpr size_t kOutputBytes = kQueries + 4 * kKeys + kScales + kSums;
};

// How many of the blocks of keys are sampled: one in so many, another one for every block of queries.
inline GTP_HOST_DEVICE int sample_step(int64_t tokens) {
  return tokens >= 512 ? 8 : tokens >= 256 ? 4 : 2;
}
// How many values that are.
inline int64_t sampled(int64_t tokens) {
  const int64_t step = sample_step(tokens);
  const auto of_block = [=](int64_t block, int64_t size) { return std::min(tokens - block * size, size); };
  int64_t count = 0;
  for (int64_t rows = 0; rows * kSweepRows < tokens; ++rows) {
    for (int64_t keys = rows % step; keys * kSweepKeys < tokens; keys += step) {
      count += of_block(rows, kSweepRows) * of_block(keys, kSweepKeys);
    }
  }
  return count;
}

// Shared memory and place of a block that sweeps.
template <int kSize>
struct Place {
  unsigned char *q, *k;
  float* log_scales;
  int* scratch;  // kBins + 8 + kLanes
  unsigned head, image;
  int64_t first;  // query of the block
  int row;        // of this lane in the block, its first

  // Whether the keys from `first_key` on against the queries of the block are all of them values of the map.
  GTP_DEVICE bool is_whole(const MapParams& p, int first_key) const {
    return first_key + kSweepKeys <= p.a.tokens && first + kSweepRows <= p.a.tokens;
  }
};
template <int kSize>
GTP_DEVICE Place<kSize> place_of(const MapParams& p, unsigned char* memory, unsigned head, int64_t row_block) {
  Place<kSize> place;
  place.q = memory;
  place.k = place.q + Sweep<kSize>::kQueries;
  place.log_scales = reinterpret_cast<float*>(place.k + 2 * Sweep<kSize>::kKeys);
  place.scratch = reinterpret_cast<int*>(place.log_scales + 2 * kSweepKeys);
  place.head = head;
  place.image = p.image_of(head);
  place.first = row_block * kSweepRows;
  place.row = 16 * warp_id() + lane_id() / 4;
  return place;
}
// Keys or queries from row `first` on into a tile, on their way.
template <int kSize>
GTP_DEVICE void load_rows(const MapParams& p, unsigned char* tile, const void* source, const int64_t (&stride)[4],
                          bool vectors, int64_t first) {
  const void* const from = static_cast<const uint16_t*>(source) + first * stride[2];
  Tile<kSize>::template load_all<kSweepThreads, kSweepKeys, 0>(
      tile, from, stride[2], stride[3], vectors, static_cast<int>(p.a.tokens - first), static_cast<int>(p.a.head_size));
}
template <int kSize>
GTP_DEVICE void load_queries(const MapParams& p, const Place<kSize>& place) {
  static_assert(kSweepRows == kSweepKeys);
  load_rows<kSize>(p, place.q, head_of(p, p.a.q, p.a.stride_q, place.head), p.a.stride_q, p.vectors[0], place.first);
}

// visit(first key, s): the logits, to the base 2, of the warp's 16 queries against 64 keys at a time, of every
// `step`-th block of keys from `from` on; -inf for what is no key. q must be on its way or there. All threads.
template <class T, int kSize, class Visit>
GTP_DEVICE void sweep_keys(const MapParams& p, const Place<kSize>& place, int from, int step, const Visit& visit) {
  const int blocks = static_cast<int>((p.a.tokens + kSweepKeys - 1) / kSweepKeys);
  const void* const source = head_of(p, p.a.k, p.a.stride_k, place.head);
  const auto load = [&](int block, int buffer) {
    if (block < blocks) {
      const int64_t first = static_cast<int64_t>(block) * kSweepKeys;
      load_rows<kSize>(p, place.k + buffer * Sweep<kSize>::kKeys, source, p.a.stride_k, p.vectors[1], first);
      load_log_scales(place.log_scales + buffer * kSweepKeys, p, place.image, first, kSweepKeys);
    }
    commit_copies();
  };
  load(from, 0);
  int buffer = 0;
  GTP_NO_UNROLL
  for (int block = from; block < blocks; block += step) {
    load(block + step, buffer ^ 1);
    wait_copies<1>();
    sync_block();
    float s[kSweepKeys / 8][4] = {};
    multiply_keys<T, kSize>(s, place.q, 16 * warp_id(), place.k + buffer * Sweep<kSize>::kKeys);
    const float* const scales = place.log_scales + buffer * kSweepKeys;
    GTP_UNROLL
    for (int tile = 0; tile < kSweepKeys / 8; ++tile) {
      GTP_UNROLL
      for (int i = 0; i < 4; ++i) {
        s[tile][i] = fmaf(s[tile][i], p.scale_log2, scales[8 * tile + 2 * (lane_id() % 4) + i % 2]);
      }
    }
    visit(block * kSweepKeys, s);
    sync_block();
    buffer ^= 1;
  }
  wait_copies<0>();
}

// Maximum and 1 / sum of this lane's two queries; for what is no query anything.
struct RowStats {
  float largest[2], share[2];
};
GTP_DEVICE RowStats row_stats(const MapParams& p, const Workspace& w, int64_t head, int64_t row) {
  RowStats r = {};
  const float* const stats = w.stats + head * 2 * p.a.tokens;
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= p.a.tokens) continue;
    r.largest[half] = stats[row + 8 * half];
    r.share[half] = stats[p.a.tokens + row + 8 * half];
  }
  return r;
}
GTP_DEVICE float map_value(float logit, const RowStats& r, int half) {
  return exp2_fast(logit - r.largest[half]) * r.share[half];
}

// Logits of a block of keys to values of the map; what is none to the pattern kNothing.
template <int kSize>
GTP_DEVICE void take_values(const MapParams& p, const Place<kSize>& place, const RowStats& r, int first,
                            float (&s)[kSweepKeys / 8][4]) {
  const auto each = [&](const auto& is_value) {
    GTP_UNROLL
    for (int tile = 0; tile < kSweepKeys / 8; ++tile) {
      GTP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float value = map_value(s[tile][i], r, i / 2);
        s[tile][i] = is_value(8 * tile + i % 2, i / 2) ? value : float_of(kNothing);
      }
    }
  };
  if (place.is_whole(p, first)) {
    each([](int, int) { return true; });
  } else {
    const int keys = static_cast<int>(p.a.tokens) - first - 2 * (lane_id() % 4);
    const int queries = static_cast<int>(p.a.tokens - place.first) - place.row;
    each([=](int key, int half) { return key < keys && 8 * half < queries; });
  }
}
template <class F>
GTP_DEVICE void each_key(const float (&s)[kSweepKeys / 8][4], const F& f) {
  GTP_UNROLL
  for (int i = 0; i < kSweepKeys / 2; ++i) f(bits_of(s[i / 4][i % 4]));
}

// Adds a block's histogram to that of the head.
GTP_DEVICE void add_histogram(const int* histogram, int* total) {
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x)) {
    if (histogram[i]) atomic_add(total + i, histogram[i]);
  }
}
GTP_DEVICE void clear(int* values, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) values[i] = 0;
}

// grid: (row_blocks, heads of all images), as in the next two.
template <class T, int kSize>
GTP_GLOBAL(kSweepThreads, 2)
attention_statistics(GTP_CONSTANT MapParams p) {
  GTP_SHARED(memory);
  Workspace w;
  size_t counters;
  place_workspace(p, p.workspace, w, counters);
  const Place<kSize> place = place_of<kSize>(p, memory, blockIdx.y, blockIdx.x);
  const int64_t row = place.first + place.row;
  clear(place.scratch, kBins);
  load_queries(p, place);
  RowStats r = {{-kInfinity, -kInfinity}, {0, 0}};
  float sum[2] = {};
  sweep_keys<T, kSize>(p, place, 0, 1, [&](int, const auto& s) {
    for (int half = 0; half < 2; ++half) {
      float largest = r.largest[half];
      GTP_UNROLL
      for (int tile = 0; tile < kSweepKeys / 8; ++tile) {
        largest = fmaxf(largest, fmaxf(s[tile][2 * half], s[tile][2 * half + 1]));
      }
      largest = max_lanes<4>(largest);
      // Before the first finite logit there is nothing to scale down.
      sum[half] *= r.largest[half] == largest ? 1.0f : exp2_fast(r.largest[half] - largest);
      const float shift = largest == -kInfinity ? 0.0f : largest;
      GTP_UNROLL
      for (int tile = 0; tile < kSweepKeys / 8; ++tile) {
        sum[half] += exp2_fast(s[tile][2 * half] - shift) + exp2_fast(s[tile][2 * half + 1] - shift);
      }
      r.largest[half] = largest;
    }
  });
  for (int half = 0; half < 2; ++half) {
    // A row without a finite logit sums to 0, and is NaN by 0 / 0 as in the definition: exp2(-inf - -inf) is.
    r.share[half] = 1.0f / sum_lanes<4>(sum[half]);
    if (lane_id() % 4 == 0 && row + 8 * half < p.a.tokens) {
      float* const stats = w.stats + static_cast<int64_t>(place.head) * 2 * p.a.tokens;
      stats[row + 8 * half] = r.largest[half];
      stats[p.a.tokens + row + 8 * half] = r.share[half];
    }
  }
  if (p.a.rank == 0) return;
  const int step = sample_step(p.a.tokens);
  sweep_keys<T, kSize>(p, place, static_cast<int>(blockIdx.x % step), step, [&](int first, auto& s) {
    take_values(p, place, r, first, s);
    each_key(s, [&](uint32_t key) {
      if (key != kNothing) atomic_add(place.scratch + coarse_bin(key), 1);
    });
  });
  sync_block();
  add_histogram(place.scratch, w.coarse + place.head * kBins);
}

template <class T, int kSize>
GTP_GLOBAL(kSweepThreads, 2)
attention_fine(GTP_CONSTANT MapParams p) {
  GTP_SHARED(memory);
  Workspace w;
  size_t counters;
  place_workspace(p, p.workspace, w, counters);
  const Place<kSize> place = place_of<kSize>(p, memory, blockIdx.y, blockIdx.x);
  const int64_t row = place.first + place.row;
  const int* const coarse = w.coarse + place.head * kBins;
  clear(place.scratch, kBins);
  load_queries(p, place);
  const RowStats r = row_stats(p, w, place.head, row);
  const Range range = fine_range(coarse, p.ranks);
  const int step = sample_step(p.a.tokens);
  sweep_keys<T, kSize>(p, place, static_cast<int>(blockIdx.x % step), step, [&](int first, auto& s) {
    take_values(p, place, r, first, s);
    each_key(s, [&](uint32_t key) {
      const int bin = fine_bin(key, range);
      if (bin >= 0) atomic_add(place.scratch + bin, 1);
    });
  });
  sync_block();
  add_histogram(place.scratch, w.fine + place.head * kBins);
}

GTP_DEVICE Bracket bracket_of_head(const MapParams& p, const Workspace& w, unsigned head) {
  const int64_t at = static_cast<int64_t>(head) * kBins;
  return bracket_of(fine_range(w.coarse + at, p.ranks), w.fine + at, p.ranks);
}

template <class T, int kSize>
GTP_GLOBAL(kSweepThreads, 2)
attention_collect(GTP_CONSTANT MapParams p) {
  GTP_SHARED(memory);
  Workspace w;
  size_t counters;
  place_workspace(p, p.workspace, w, counters);
  const Place<kSize> place = place_of<kSize>(p, memory, blockIdx.y, blockIdx.x);
  const int64_t row = place.first + place.row;
  load_queries(p, place);
  const RowStats r = row_stats(p, w, place.head, row);
  const Bracket bracket = bracket_of_head(p, w, place.head);
  int* const counts = w.counts + 2 * place.head;
  uint32_t* const candidates = w.candidates + static_cast<int64_t>(place.head) * p.room;
  uint32_t* const held = reinterpret_cast<uint32_t*>(place.scratch);
  int* const state = place.scratch + Sweep<kSize>::kHeld;  // how many the block has; the first place of those held
  clear(state, 1);
  int below = 0;
  sweep_keys<T, kSize>(p, place, 0, 1, [&](int first, auto& s) {
    take_values(p, place, r, first, s);
    int lower = 0, upto = 0;
    each_key(s, [&](uint32_t key) {
      count_below(lower, key, bracket.low);
      count_below(upto, key, bracket.high);
    });
    below += lower;
    const int inside = upto - lower;
    const int last = scan_lanes(inside);
    int at = 0;
    if (lane_id() == kLanes - 1) at = atomic_add(state, last);
    at = shuffle(at, kLanes - 1) + last - inside;
    if (at + inside <= Sweep<kSize>::kHeld) {
      Address end = shared_address(held + at);
      each_key(s, [&](uint32_t key) { append_within(end, key, bracket.low, bracket.high - bracket.low); });
      return;
    }
    each_key(s, [&](uint32_t key) {
      if (key < bracket.low || key >= bracket.high) return;
      const int place_here = at++;
      if (place_here < Sweep<kSize>::kHeld) {
        held[place_here] = key;
      } else if (const int there = atomic_add(counts + 1, 1); there >= 0 && there < p.room) {
        candidates[there] = key;
      }
    });
  });
  below = sum_lanes(below);
  if (lane_id() == 0) atomic_add(counts, below);
  sync_block();
  const int count = state[0] < Sweep<kSize>::kHeld ? state[0] : Sweep<kSize>::kHeld;
  if (threadIdx.x == 0) state[1] = atomic_add(counts + 1, count);
  sync_block();
  const int from = state[1];
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kSweepThreads) {
    if (from + i < p.room) candidates[from + i] = held[i];
  }
}

// grid: heads of all images.
template <class T, int kSize>
GTP_GLOBAL(kSweepThreads, 2)
attention_select(GTP_CONSTANT MapParams p) {
  GTP_SHARED(memory);
  Workspace w;
  size_t counters;
  place_workspace(p, p.workspace, w, counters);
  Place<kSize> place = place_of<kSize>(p, memory, blockIdx.x, 0);
  const Bracket bracket = bracket_of_head(p, w, place.head);
  const int below = w.counts[2 * place.head], inside = w.counts[2 * place.head + 1];
  const int wanted = p.wanted;
  int *const histogram = place.scratch, *const state = place.scratch + kBins;
  clear(histogram, kBins + 4);
  sync_block();
  uint32_t found;
  if (below < wanted && wanted <= below + inside && inside <= p.room && !p.a.force_miss) {
    const uint32_t* const candidates = w.candidates + static_cast<int64_t>(place.head) * p.room;
    const auto collected = [&](const auto& f) {
      for (int i = static_cast<int>(threadIdx.x); i < inside; i += kSweepThreads) f(candidates[i]);
    };
    const int bits = 32 - leading_zeros(bracket.high - bracket.low - 1);
    uint32_t* const few = reinterpret_cast<uint32_t*>(state + 8);
    found = radix_select(collected, bracket.low, bits, wanted - below, histogram, state, few);
  } else {
    const auto each = [&](const auto& f) {
      GTP_NO_UNROLL
      for (int block = 0; block < p.row_blocks; ++block) {
        place.first = static_cast<int64_t>(block) * kSweepRows;
        load_queries(p, place);
        const RowStats r = row_stats(p, w, place.head, place.first + place.row);
        sweep_keys<T, kSize>(p, place, 0, 1, [&](int first, auto& s) {
          take_values(p, place, r, first, s);
          each_key(s, f);
        });
        sync_block();
      }
    };
    found = radix_select(each, 0u, 32, wanted, histogram, state);
  }
  if (threadIdx.x == 0) w.threshold[place.head] = float_of(found);
}

// grid: (row_blocks, heads of all images).
template <class T, int kSize>
GTP_GLOBAL(kSweepThreads, kSize > 64 ? 1 : 2)
attention_output(GTP_CONSTANT MapParams p) {
  GTP_SHARED(memory);
  Workspace w;
  size_t counters;
  place_workspace(p, p.workspace, w, counters);
  const Place<kSize> place = place_of<kSize>(p, memory, blockIdx.y, blockIdx.x);
  unsigned char* const v = memory + Sweep<kSize>::kQueries + 2 * Sweep<kSize>::kKeys + Sweep<kSize>::kScales;
  float* const sums = reinterpret_cast<float*>(v + 2 * Sweep<kSize>::kKeys);
  const int tokens = static_cast<int>(p.a.tokens), t = lane_id() % 4;
  const int row = static_cast<int>(place.first) + place.row;
  load_queries(p, place);
  const RowStats r = row_stats(p, w, place.head, row);
  const float threshold = p.a.rank > 0 ? w.threshold[place.head] : 0.0f;
  const void* const values = head_of(p, p.a.v, p.a.stride_v, place.head);
  float* const diag = static_cast<float*>(p.a.diag) + static_cast<int64_t>(place.head) * tokens;
  float* const cls_row = static_cast<float*>(p.a.cls_row) + static_cast<int64_t>(place.head) * tokens;
  float* const block_sums = w.sums + (static_cast<int64_t>(place.head) * p.row_blocks + blockIdx.x) * tokens;
  float out[kSize / 8][4] = {};
  int buffer = 0;
  sweep_keys<T, kSize>(p, place, 0, 1, [&](int first, auto& s) {
    unsigned char* const rows = v + buffer * Sweep<kSize>::kKeys;
    load_rows<kSize>(p, rows, values, p.a.stride_v, p.vectors[2], first);
    commit_copies();
    take_values(p, place, r, first, s);
    // What is no value is zero; NaN that is one stays.
    const auto each = [&](const auto& f) {
      GTP_UNROLL
      for (int i = 0; i < kSweepKeys / 2; ++i) {
        f(s[i / 4][i % 4], first + i / 4 * 8 + 2 * t + i % 2, row + i % 4 / 2 * 8);
      }
    };
    if (!place.is_whole(p, first)) {
      each([&](float& value, int key, int query) { value = key < tokens && query < tokens ? value : 0.0f; });
    }
    each([&](float& value, int, int) { value = value < threshold ? 0.0f : value; });
    if (first == place.first) {
      each([&](float& value, int key, int query) {
        if (key == query && key < tokens) diag[key] = value;
      });
    }
    if (row == 0) {
      each([&](float& value, int key, int query) {
        if (query == 0 && key < tokens) cls_row[key] = value;
      });
    }
    GTP_UNROLL
    for (int tile = 0; tile < kSweepKeys / 8; tile += 4) {
      float u[8];
      GTP_UNROLL
      for (int i = 0; i < 8; ++i) u[i] = s[tile + i / 2][i % 2] + s[tile + i / 2][i % 2 + 2];
      const float column = sum_columns(u);
      sums[warp_id() * kSweepKeys + 8 * tile + column_of_lane()] = column;
    }
    wait_copies<0>();
    sync_block();
    GTP_UNROLL
    for (int step = 0; step < kSweepKeys / 16; ++step) {
      uint32_t packed[4];
      pack_tiles<T>(packed, s[2 * step], s[2 * step + 1]);
      multiply_values<T, kSize, kSize / 16>(out, packed, rows, 16 * step, 0);
    }
    for (int i = static_cast<int>(threadIdx.x); i < kSweepKeys; i += kSweepThreads) {
      float total = 0;
      for (int warp = 0; warp < kSweepWarps; ++warp) total += sums[warp * kSweepKeys + i];
      if (first + i < tokens) block_sums[first + i] = total;
    }
    buffer ^= 1;
  });
  store_out<T, kSize / 16>(p, place.head, row, 0, out);
}

}  // namespace cuda
}  // namespace gtp
