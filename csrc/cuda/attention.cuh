// The attention whose softmax map stays in the registers of one block: one (image, head) at a time, 16 queries a warp.
//
//   A = softmax(q k^T scale + log(token_scales)),  A_ij = 0 where A_ij < T,  out = A v, and the sums of A
//
// Reads q, k and v once and writes out once: 4 N d values of 2 bytes, and 3 N of 4 bytes. 4 N^2 d FLOPs on tensor
// cores, N^2 exponentials. A block takes one head after another; q and k of the next one are on their way while it
// selects and multiplies v, and v while it multiplies the keys.
#pragma once

#include "cuda/attention_edge.cuh"
#include "cuda/attention_map.cuh"
#include "cuda/attention_threshold.cuh"

namespace gtp {
namespace cuda {

constexpr GTP_HOST_DEVICE int smaller(int a, int b) {
  return a < b ? a : b;
}
constexpr GTP_HOST_DEVICE size_t larger(size_t a, size_t b) {
  return a > b ? a : b;
}
// A number as an argument.
template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

// N up to 8 kTiles, and for an edge more than 192. A warp has 16 queries, and the warps share those of the edge.
template <int kSize, int kNumTiles>
struct RegisterForm {
  using EdgeForm = Edge<kSize, kNumTiles>;
  static constexpr bool kHasEdge = EdgeForm::kGroups > 0;
  static constexpr int kTiles = kNumTiles, kSteps = (kTiles + 1) / 2;
  static constexpr int kWarps = kHasEdge ? EdgeForm::kWarps : kSteps;
  static constexpr int kTokens = 16 * kSteps;                                  // in shared memory
  static constexpr int kCount = 16 * kWarps * 8 * kTiles + EdgeForm::kPlaces;  // places of the map
  static constexpr int kThreads = kLanes * kWarps;
  // Of a block on one multiprocessor; registers allow that many.
  static constexpr int kBlocks = kSteps > 8 ? 1 : kSteps > 4 || kSize > 64 ? 2 : 3;
  // One tile of keys in so many is the sample, of a warp's own queries.
  static constexpr int kSampleStep = kSteps >= 7 ? 8 : kSteps >= 4 ? 4 : 1;
  static constexpr int kRoom = kCount / (kSteps > 8 ? 12 : 8);  // candidates; a smaller sample leaves more of them
  static constexpr GTP_HOST_DEVICE bool is_sampled(int tile, int warp) {
    return (tile + warp) % kSampleStep == 0;
  }
  // Of a map of so many tokens, the values in the sample.
  static int sampled(int tokens) {
    const auto there = [=](int first, int count) { return tokens <= first ? 0 : smaller(tokens - first, count); };
    int count = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      for (int tile = 0; tile < kTiles; ++tile) {
        if (is_sampled(tile, warp)) count += there(16 * warp, 16) * there(8 * tile, 8);
      }
    }
    return count;
  }
  static constexpr int kState = 16;
  // Three histograms and a state to find the threshold with, behind which first the logits of the edge are, then the
  // candidates; after that the column sums of each warp and of the edge, and the edge as an operand.
  static constexpr int kCounters = 3 * kBins + kState;
  static constexpr size_t kSums = sizeof(float) * (kWarps + kHasEdge) * kTokens;
  static constexpr size_t kScratch = larger(
      sizeof(int) * kCounters + larger(sizeof(int) * kRoom, EdgeForm::kLogitsBytes), kSums + EdgeForm::kMapBytes);
  static constexpr size_t kBytes =
      3 * Tile<kSize>::bytes(kTokens) + 2 * sizeof(float) * kTokens + EdgeForm::kStatsBytes + kScratch;
};

// This lane's values of the map: of queries g and g + 8 of its warp, and of the edge.
template <class Form>
struct RegisterMap {
  float rows[Form::kTiles][4];
  typename Form::EdgeForm edge;

  template <class F>
  GTP_DEVICE void each_key(const F& f) const {
    GTP_UNROLL
    for (int i = 0; i < Form::kTiles * 4; ++i) f(bits_of(rows[i / 4][i % 4]));
    if constexpr (Form::kHasEdge) edge.each_key(f);
  }
};

// T of the map in the registers of a block, by all its threads. The zeros that pad the map are below all its values, or
// equal to the lowest: they move the rank. `scratch` holds RegisterForm::kScratch bytes, kCounters zeros first.
template <class Form>
GTP_DEVICE float threshold_in_registers(const RegisterMap<Form>& s, int wanted, SampleRanks ranks, bool force_miss,
                                        int* scratch) {
  int* const coarse = scratch;
  int* const fine = scratch + kBins;
  int* const digits = scratch + 2 * kBins;
  int* const state = scratch + 3 * kBins;  // of radix_select; then counts, and a range
  int* const counts = state + 4;
  int* const range_there = state + 8;
  uint32_t* const candidates = reinterpret_cast<uint32_t*>(scratch + Form::kCounters);
  const auto each = [&](const auto& f) { s.each_key(f); };
  const auto sample = [&](const auto& f) {
    // One branch for a warp.
    const int turn = forget(warp_id() % Form::kSampleStep);
    GTP_UNROLL
    for (int of = 0; of < Form::kSampleStep; ++of) {
      if (turn != of) continue;
      GTP_UNROLL
      for (int tile = 0; tile < Form::kTiles; ++tile) {
        if (!Form::is_sampled(tile, of)) continue;
        GTP_UNROLL
        for (int i = 0; i < 4; ++i) f(bits_of(s.rows[tile][i]));
      }
    }
  };
  sample([&](uint32_t key) { atomic_add(coarse + coarse_bin(key), 1); });
  sync_block();
  Range range = fine_range(coarse, ranks);
  if (threadIdx.x == 0) *reinterpret_cast<Range*>(range_there) = range;
  sample([&](uint32_t key) {
    const int bin = fine_bin(key, range);
    if (bin >= 0) atomic_add(fine + bin, 1);
  });
  sync_block();
  range = *reinterpret_cast<const Range*>(range_there);
  Bracket bracket = bracket_of(range, fine, ranks);
  bracket.low = bracket.low ? bracket.low : 1;  // the zeros that pad the map are no candidates
  int below = 0, upto = 0;
  each([&](uint32_t key) {
    count_below(below, key, bracket.low);
    count_below(upto, key, bracket.high);
  });
  int inside = upto - below;
  const int last = scan_lanes(inside);
  int at = 0;
  if (lane_id() == kLanes - 1) at = atomic_add(counts + 1, last);
  at = shuffle(at, kLanes - 1) + last - inside;
  below = sum_lanes(below);
  if (lane_id() == 0) atomic_add(counts, below);
  bracket = {forget(bracket.low), forget(bracket.high)};
  if (at + inside <= Form::kRoom) {
    Address end = shared_address(candidates + at);
    each([&](uint32_t key) { append_within(end, key, bracket.low, bracket.high - bracket.low); });
  }
  sync_block();
  below = counts[0];
  inside = counts[1];
  if (below < wanted && wanted <= below + inside && inside <= Form::kRoom && !force_miss) {
    const auto collected = [&](const auto& f) {
      GTP_NO_UNROLL
      for (int i = static_cast<int>(threadIdx.x); i < inside; i += Form::kThreads) f(candidates[i]);
    };
    const int bits = 32 - leading_zeros(bracket.high - bracket.low - 1);
    uint32_t* const few = reinterpret_cast<uint32_t*>(coarse);
    return float_of(radix_select(collected, bracket.low, bits, wanted - below, digits, state, few));
  }
  return float_of(radix_select(each, 0u, 32, wanted, digits, state));
}

// One block per multiprocessor or a few; each takes heads blockIdx.x, blockIdx.x + gridDim.x, ...
template <class T, int kSize, int kTiles, int kBefore>
GTP_GLOBAL(RegisterForm<kSize, kTiles>::kThreads, RegisterForm<kSize, kTiles>::kBlocks)
attention_in_registers(GTP_CONSTANT MapParams p) {
  using Form = RegisterForm<kSize, kTiles>;
  using Tiles = Tile<kSize>;
  constexpr int kSteps = Form::kSteps, kWarps = Form::kWarps;
  static_assert(!Form::kHasEdge || 8 * kBefore >= 16 * kWarps, "beside an edge the rows of all warps are queries");
  GTP_SHARED(memory);
  unsigned char* const q = memory;
  unsigned char* const k = q + Tiles::bytes(Form::kTokens);
  unsigned char* const v = k + Tiles::bytes(Form::kTokens);
  float* const log_scales = reinterpret_cast<float*>(v + Tiles::bytes(Form::kTokens));
  float* const cls_row = log_scales + Form::kTokens;
  float* const edge_stats = cls_row + Form::kTokens;
  int* const scratch = reinterpret_cast<int*>(edge_stats + Form::EdgeForm::kStatsBytes / sizeof(float));
  float* const edge_logits = reinterpret_cast<float*>(scratch + Form::kCounters);

  // Of what a thread is, only its number stays in a register; the rest is found anew where it is used.
  const auto thread = [] { return forget(static_cast<int>(threadIdx.x)); };
  const auto rows_of_warp = [&] { return thread() / kLanes * 16; };
  const auto first_query = [&] { return rows_of_warp() + thread() % kLanes / 4; };  // its queries are 8 apart
  const int tokens = static_cast<int>(p.a.tokens), size = static_cast<int>(p.a.head_size);
  const auto load = [&](unsigned char* tile, const void* array, const int64_t (&stride)[4], bool vectors,
                        unsigned head) {
    if (head >= p.heads) return;
    const void* const source = head_of(p, array, stride, head);
    Tiles::template load_all<Form::kThreads, Form::kTokens, 8 * kBefore + 1>(tile, source, stride[2], stride[3],
                                                                             vectors, tokens, size);
  };
  const auto load_keys = [&](unsigned head) {
    load(q, p.a.q, p.a.stride_q, p.vectors[0], head);
    load(k, p.a.k, p.a.stride_k, p.vectors[1], head);
    commit_copies();
  };
  const auto load_values = [&](unsigned head) {
    load(v, p.a.v, p.a.stride_v, p.vectors[2], head);
    commit_copies();
  };
  // f(value of the map, which of this lane's queries of the warp, tile, key).
  RegisterMap<Form> s;
  const auto each = [&](const auto& f) {
    const int t = thread() % 4;
    GTP_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      GTP_UNROLL
      for (int i = 0; i < 4; ++i) f(s.rows[tile][i], i / 2, tile, 8 * tile + 2 * t + i % 2);
    }
  };

  load_keys(blockIdx.x);
  load_values(blockIdx.x);
  GTP_NO_UNROLL
  for (unsigned head = blockIdx.x; head < p.heads; head += gridDim.x) {
    load_log_scales(log_scales, p, p.image_of(head), 0, Form::kTokens);
    if (p.wanted > 0) {
      GTP_NO_UNROLL
      for (int i = static_cast<int>(threadIdx.x); i < Form::kCounters; i += Form::kThreads) scratch[i] = 0;
    }
    wait_copies<1>();
    sync_block();
    if constexpr (Form::kHasEdge) {
      s.edge.template take_logits<T>(q, k, p.scale_log2, log_scales, edge_logits, edge_stats);
    }
    GTP_UNROLL
    for (int i = 0; i < 4 * kTiles; ++i) s.rows[i / 4][i % 4] = 0;
    multiply_keys<T, kSize>(s.rows, q, rows_of_warp(), k);
    sync_block();
    load_keys(head + gridDim.x);

    // Softmax: each query's values are in the four lanes of its g.
    float largest[2] = {-kInfinity, -kInfinity}, sum[2] = {};
    each([&](float& value, int query, int, int key) {
      value = fmaf(value, p.scale_log2, log_scales[key]);
      largest[query] = fmaxf(largest[query], value);
    });
    // In one exchange: apart, ptxas starts the exponentials of the first before the second is known, and spills.
    combine_pair(largest, [](float a, float b) { return fmaxf(a, b); });
    each([&](float& value, int query, int, int) {
      value = exp2_fast(value - largest[query]);
      sum[query] += value;
    });
    GTP_UNROLL
    for (int i = 0; i < 2; ++i) sum[i] = 1.0f / sum_lanes<4>(sum[i]);
    // What pads the map to whole tiles is zero, in a row of NaN too.
    const int first = first_query();
    const auto share = [&](bool is_query) {
      return [&, is_query](float& value, int query, int tile, int key) {
        const bool is_value = (is_query || first + 8 * query < tokens) && (tile < kBefore || key < tokens);
        value = is_value ? value * sum[query] : 0.0f;
      };
    };
    if (Form::kHasEdge || rows_of_warp() + 16 <= tokens) {
      each(share(true));
    } else {
      each(share(false));
    }
    if constexpr (Form::kHasEdge) s.edge.take_values(edge_logits, edge_stats, tokens);

    if (p.wanted > 0) {
      const float threshold = threshold_in_registers<Form>(s, p.wanted, p.ranks, p.a.force_miss, scratch);
      sync_block();
      // NaN is not below a threshold and stays, as does everything where the threshold is NaN.
      each([&](float& value, int, int, int) { value = value < threshold ? 0.0f : value; });
      if constexpr (Form::kHasEdge) {
        s.edge.each([&](float& value, int, int, bool) { value = value < threshold ? 0.0f : value; });
      }
    } else if (Form::kHasEdge) {
      sync_block();  // the logits of the edge are where the sums will be
    }

    // The sums of what is left.
    float* const sums = reinterpret_cast<float*>(scratch);
    unsigned char* const edge_map = reinterpret_cast<unsigned char*>(sums) + Form::kSums;
    GTP_UNROLL
    for (int tile = 0; tile < kTiles; tile += 4) {
      float u[8];
      GTP_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int of = smaller(tile + i / 2, kTiles - 1);
        u[i] = tile + i / 2 < kTiles ? s.rows[of][i % 2] + s.rows[of][i % 2 + 2] : 0.0f;
      }
      const float column = sum_columns(u);
      const int key = 8 * tile + column_of_lane();
      if (key < Form::kTokens) sums[thread() / kLanes * Form::kTokens + key] = column;
    }
    if constexpr (Form::kHasEdge) {
      s.edge.store_sums(sums + kWarps * Form::kTokens);
      s.edge.template store_map<T>(edge_map);
    }
    // On the diagonal, lane (g, t) has a value where t is g / 2: of the pair g % 2 of query g against keys 0 to 7, and
    // of query g + 8 against keys 8 to 15.
    float on_diagonal[2] = {};
    const bool odd = thread() / 4 % 2;
    GTP_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      if (forget(warp_id()) != w) continue;  // hidden, so that no array is made of it
      GTP_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int tile = smaller(2 * w + i, kTiles - 1);
        on_diagonal[i] = odd ? s.rows[tile][i * 2 + 1] : s.rows[tile][i * 2];
      }
    }
    float* const diag = static_cast<float*>(p.a.diag) + static_cast<int64_t>(head) * tokens;
    GTP_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int query = first_query() + 8 * i;
      if (thread() % 4 == thread() % kLanes / 8 && query < tokens) diag[query] = on_diagonal[i];
    }
    if constexpr (Form::kHasEdge) s.edge.store_diagonal(diag, tokens);
    if (first_query() == 0) {
      each([&](float& value, int query, int, int key) {
        if (query == 0) cls_row[key] = value;
      });
    }

    uint32_t packed[kSteps][4];
    GTP_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      float pair[2][4] = {};
      GTP_UNROLL
      for (int j = 0; j < 8; ++j) {
        const int tile = 2 * step + j / 4;
        if (tile < kTiles) pair[j / 4][j % 4] = s.rows[tile < kTiles ? tile : 0][j % 4];
      }
      pack_tiles<T>(packed[step], pair[0], pair[1]);
    }
    wait_copies<1>();
    sync_block();
    // Some dimensions at a time: their sums fit the registers beside the packed map.
    const auto multiply_part = [&](auto from, auto pairs) {
      constexpr int kFrom = decltype(from)::value, kPairs = decltype(pairs)::value;
      if constexpr (kPairs > 0) {
        float out[2 * kPairs][4] = {};
        GTP_UNROLL
        for (int step = 0; step < kSteps; ++step) {
          multiply_values<T, kSize, kPairs>(out, packed[step], v, 16 * step, kFrom);
        }
        store_out<T, kPairs>(p, head, first_query(), kFrom, out);
      }
    };
    constexpr int kPairs = kSize / 16, kPart = 2;
    static_assert(4 * kPart >= kPairs);
    multiply_part(Number<0>(), Number<kPart>());
    multiply_part(Number<kPart>(), Number<smaller(kPart, kPairs - kPart)>());
    multiply_part(Number<2 * kPart>(), Number<smaller(kPart, kPairs - 2 * kPart)>());
    multiply_part(Number<3 * kPart>(), Number<smaller(kPart, kPairs - 3 * kPart)>());
    if constexpr (Form::kHasEdge) s.edge.template multiply_and_store<T>(p, head, edge_map, v);
    const int64_t scores = static_cast<int64_t>(head) * tokens;
    GTP_NO_UNROLL
    for (int key = static_cast<int>(threadIdx.x); key < tokens; key += Form::kThreads) {
      float total = 0;
      GTP_UNROLL
      for (int w = 0; w < kWarps + Form::kHasEdge; ++w) total += sums[w * Form::kTokens + key];
      static_cast<float*>(p.a.colsum)[scores + key] = total;
      static_cast<float*>(p.a.cls_row)[scores + key] = cls_row[key];
    }
    sync_block();
    load_values(head + gridDim.x);
  }
}

}  // namespace cuda
}  // namespace gtp
