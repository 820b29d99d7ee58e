// The queries beyond 192 of a map in registers (attention.cuh), 8 for each tile of keys beyond 24.
//
// 12 warps may have 168 registers a thread, which a warp's 16 queries leave room in; a thirteenth warp would bring that
// down to 128, as a quarter of the multiprocessor would then have four. So no warp has these queries to itself: each
// holds two tiles of their keys, and the first warps one more, 2 values a thread and tile. Their rows meet in shared
// memory twice: for the maximum and the sum, and as the left operand of the product with v, which a few warps take.
#pragma once

#include "cuda/attention_map.cuh"

namespace gtp {
namespace cuda {

template <int kSize, int kTiles>
struct Edge {
  static constexpr int kWarps = 12, kWarpTiles = 2 * kWarps;
  static constexpr int kGroups = kTiles > kWarpTiles ? kTiles - kWarpTiles : 0;  // of 8 queries; 0: there is no edge
  static constexpr int kHeld = 3;                                                // tiles of a warp
  static constexpr int kQueries = 8 * kGroups, kFirst = 8 * kWarpTiles;
  static constexpr int kPlaces = kQueries * 8 * kHeld * kWarps;  // of the map
  static_assert(kGroups <= 2 && kSize / 16 <= kWarps);
  using Tiles = Tile<kSize>;

  // Of each warp and query the maximum and the sum.
  static constexpr size_t kStatsBytes = sizeof(float) * 2 * kWarps * kQueries;
  // The rows as an operand, so far apart that the 8 rows that an instruction reads are in 8 groups of banks.
  static constexpr int kStride = 8 * (kWarpTiles + 3);
  static constexpr size_t kMapBytes = sizeof(uint16_t) * kStride * kQueries;
  static constexpr size_t kLogitsBytes = sizeof(float) * kStride * kQueries;

  // Against its tiles those of queries g and g + 8 of the edge, each with keys 2t and 2t + 1.
  float s[kHeld][2 * (kGroups ? kGroups : 1)];

  static GTP_DEVICE bool holds(int tile, int warp) {
    return tile < 2 || warp < kGroups;
  }
  static GTP_DEVICE int first_key(int tile, int warp) {
    return tile < 2 ? 16 * warp + 8 * tile : kFirst + 8 * warp;
  }
  // Where in logits or in the map the value of this lane's query of a group is.
  static GTP_DEVICE int place_of(int group, int key) {
    return (8 * group + forget(lane_id()) / 4) * kStride + key;
  }
  // f(value, query / 8, key, whether it is held).
  template <class F>
  GTP_DEVICE void each(const F& f) {
    const int lane = forget(lane_id()), warp = forget(warp_id());
    GTP_UNROLL
    for (int tile = 0; tile < kHeld; ++tile) {
      GTP_UNROLL
      for (int i = 0; i < 2 * kGroups; ++i) {
        f(s[tile][i], i / 2, first_key(tile, warp) + lane % 4 * 2 + i % 2, holds(tile, warp));
      }
    }
  }
  template <class F>
  GTP_DEVICE void each_key(const F& f) const {
    GTP_UNROLL
    for (int i = 0; i < kHeld * 2 * kGroups; ++i) f(bits_of(s[i / (2 * kGroups)][i % (2 * kGroups)]));
  }

  // s = q k^T as logits to the base 2. They wait in `logits`, while the warp's own rows want the registers; `stats`
  // gets maximum and sum of the part of each row that the warp has, for all of them.
  template <class T>
  GTP_DEVICE void take_logits(const unsigned char* q, const unsigned char* k, float scale_log2, const float* log_scales,
                              float* logits, float* stats) {
    const int lane = forget(lane_id()), warp = forget(warp_id());
    float own[2][4] = {}, last[2][4] = {};
    multiply_keys<T, kSize>(own, q, kFirst, k + 16 * warp * Tiles::kRowBytes);
    if (warp < kGroups) multiply_keys<T, kSize>(last, q, kFirst, k + kFirst * Tiles::kRowBytes);
    GTP_UNROLL
    for (int i = 0; i < 2 * kGroups; ++i) {
      s[0][i] = own[0][i];
      s[1][i] = own[1][i];
      s[2][i] = kGroups > 1 && warp > 0 ? last[1][i] : last[0][i];
    }
    float largest[2] = {-kInfinity, -kInfinity}, sum[2] = {};
    each([&](float& value, int group, int key, bool held) {
      value = held ? fmaf(value, scale_log2, log_scales[key]) : -kInfinity;
      if (held) logits[place_of(group, key)] = value;
      largest[group] = fmaxf(largest[group], value);
    });
    GTP_UNROLL
    for (int group = 0; group < kGroups; ++group) largest[group] = max_lanes<4>(largest[group]);
    each([&](float& value, int group, int, bool) {
      sum[group] += exp2_fast(value - (largest[group] == -kInfinity ? 0.0f : largest[group]));
    });
    GTP_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      sum[group] = sum_lanes<4>(sum[group]);
      float* const there = stats + 2 * (warp * kQueries + 8 * group + lane / 4);
      if (lane % 4 == 0) there[0] = largest[group], there[1] = sum[group];
    }
  }

  // The values of the map of the logits, zero where they pad it. The lanes of a row take three warps' parts each.
  GTP_DEVICE void take_values(const float* logits, const float* stats, int tokens) {
    const int lane = forget(lane_id());
    float largest[2], share[2];
    bool is_query[2];
    GTP_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const float* const there = stats + 2 * (lane % 4 * kQueries + 8 * group + lane / 4);
      constexpr int kNext = 2 * 4 * kQueries;
      largest[group] = max_lanes<4>(fmaxf(fmaxf(there[0], there[kNext]), there[2 * kNext]));
      // A row without a finite logit is NaN, as exp2(-inf - -inf) is.
      float sum = 0;
      GTP_UNROLL
      for (int i = 0; i < kWarps / 4; ++i) sum += there[i * kNext + 1] * exp2_fast(there[i * kNext] - largest[group]);
      share[group] = 1.0f / sum_lanes<4>(sum);
      is_query[group] = kFirst + 8 * group + lane / 4 < tokens;
    }
    each([&](float& value, int group, int key, bool held) {
      value = 0.0f;
      if (held && is_query[group] && key < tokens) {
        value = exp2_fast(logits[place_of(group, key)] - largest[group]) * share[group];
      }
    });
  }

  // Column sums over the queries of the edge: sums[key] for the keys that the warp has.
  GTP_DEVICE void store_sums(float* sums) const {
    float u[8] = {};
    GTP_UNROLL
    for (int i = 0; i < 2 * kHeld * kGroups; ++i) {
      u[i % (2 * kHeld)] += s[i % (2 * kHeld) / 2][i / (2 * kHeld) * 2 + i % 2];
    }
    const float column = sum_columns(u);
    const int at = column_of_lane(), tile = at / 8, warp = forget(warp_id());
    if (tile < kHeld && holds(tile, warp)) sums[(tile < 2 ? 16 * warp + at : kFirst + 8 * warp + at % 8)] = column;
  }

  GTP_DEVICE void store_diagonal(float* diag, int tokens) const {
    const int lane = forget(lane_id()), warp = forget(warp_id());
    if (warp >= kGroups || lane % 4 != lane / 8) return;
    const int query = kFirst + 8 * warp + lane / 4;
    float value = lane / 4 % 2 ? s[2][1] : s[2][0];
    if (kGroups > 1 && warp > 0) value = lane / 4 % 2 ? s[2][2 * kGroups - 1] : s[2][2 * kGroups - 2];
    if (query < tokens) diag[query] = value;
  }

  // The rows in the type of v; zeros beyond the keys, up to a whole pair of tiles.
  template <class T>
  GTP_DEVICE void store_map(unsigned char* map) const {
    const int lane = forget(lane_id()), warp = forget(warp_id());
    GTP_UNROLL
    for (int tile = 0; tile < kHeld; ++tile) {
      if (tile == 2 && warp > 1) continue;
      GTP_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        const int at = place_of(group, first_key(tile, warp) + lane % 4 * 2);
        *reinterpret_cast<uint32_t*>(map + 2 * at) = pack(s[tile][2 * group], s[tile][2 * group + 1], T());
      }
    }
  }

  // Their rows of out, 16 dimensions a warp, by the first warps: the map times v.
  template <class T>
  GTP_DEVICE void multiply_and_store(const MapParams& p, unsigned head, const unsigned char* map,
                                     const unsigned char* v) const {
    const int lane = forget(lane_id()), warp = forget(warp_id());
    if (warp >= kSize / 16) return;
    // With one group, rows 8 to 15 of the operand are those of the first again, and the result's are not stored.
    const Address rows = shared_address(map) + 2 * (lane % kQueries * kStride + lane / 16 * 8);
    float out[2][4] = {};
    GTP_UNROLL
    for (int step = 0; step < kWarps + 1; ++step) {
      uint32_t a[4];
      load_matrices<false>(a, rows + 32 * step);
      multiply_values<T, kSize, 1>(out, a, v, 16 * step, warp);
    }
    store_out<T, 1>(p, head, kFirst + lane / 4, warp, out);
  }
};

}  // namespace cuda
}  // namespace gtp
