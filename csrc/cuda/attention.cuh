// The attention whose softmax map stays in the registers of one block: one (image, head) at a time, 16 queries a warp.
//
//   A = softmax(q k^T scale + log(token_scales)),  A_ij = 0 where A_ij < T,  out = A v, and the sums of A
//
// Reads q, k and v once and writes out once: 4 N d values of 2 bytes, and 3 N of 4 bytes. 4 N^2 d FLOPs on tensor
// cores, N^2 exponentials. A block takes one head after another; q and k of the next one are on their way while it
// selects and multiplies v, and v while it multiplies the keys.
#pragma once

#include "cuda/attention_map.cuh"
#include "cuda/attention_threshold.cuh"

namespace gtp {
namespace cuda {

// N up to 16 kSteps, and kSteps at most 12: of 13 warps one multiprocessor's quarter has four, which leaves 128
// registers a thread, and a row of 208 values takes 104 of them.
template <int kSize, int kSteps>
struct RegisterForm {
  static_assert(kSteps <= 12);
  static constexpr int kTokens = 16 * kSteps;
  static constexpr int kThreads = kLanes * kSteps;
  // Of a block on one multiprocessor; registers allow that many.
  static constexpr int kBlocks = kSteps > 8 ? 1 : kSteps > 4 || kSize > 64 ? 2 : 3;
  // One tile of keys in so many is the sample.
  static constexpr int kSampleStep = kSteps >= 7 ? 8 : kSteps >= 4 ? 4 : 1;
  static constexpr int kRoom = 12 * kSteps * kSteps + 64;  // candidates: some 5 % of the map
  static constexpr int kState = 8;
  // While the threshold is sought, two histograms, the state and the candidates; then the column sums of each warp.
  static constexpr size_t kSelecting = sizeof(int) * (2 * kBins + kState + kRoom);
  static constexpr size_t kSumming = sizeof(float) * kSteps * kTokens;
  static constexpr size_t kBytes =
      3 * Tile<kSize>::bytes(kTokens) + 2 * sizeof(float) * kTokens + (kSelecting > kSumming ? kSelecting : kSumming);
};

// A number as an argument.
template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

// The 16 rows of the map that a warp holds.
template <class Form>
using RegisterMap = float[Form::kTokens / 8][4];

// T of the map in the registers of a block, by all its threads. The zeros that pad the map are below all its values, or
// equal to the lowest: they move the rank. `scratch` holds RegisterForm::kSelecting bytes.
template <class Form>
GTP_DEVICE float threshold_in_registers(const RegisterMap<Form>& s, int64_t rank, int64_t tokens, bool force_miss,
                                        int* scratch) {
  constexpr int kTiles = Form::kTokens / 8, kCount = Form::kTokens * Form::kTokens;
  const int wanted = static_cast<int>(rank + kCount - tokens * tokens);
  int* const coarse = scratch;
  int* const fine = scratch + kBins;
  int* const state = scratch + 2 * kBins;
  uint32_t* const candidates = reinterpret_cast<uint32_t*>(scratch + 2 * kBins + Form::kState);
  const auto each = [&](const auto& f) {
    GTP_UNROLL
    for (int i = 0; i < 4 * kTiles; ++i) f(bits_of(s[i / 4][i % 4]));
  };
  const auto sample = [&](const auto& f) {
    GTP_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      if ((tile + warp_id()) % Form::kSampleStep) continue;
      GTP_UNROLL
      for (int i = 0; i < 4; ++i) f(bits_of(s[tile][i]));
    }
  };
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kBins + Form::kState; i += Form::kThreads) scratch[i] = 0;
  sync_block();
  sample([&](uint32_t key) { atomic_add(coarse + coarse_bin(key), 1); });
  sync_block();
  const int total = total_of(coarse);
  const SampleRanks ranks = sample_ranks(wanted, kCount, total);
  const Range range = fine_range(coarse, ranks);
  sample([&](uint32_t key) {
    const int bin = fine_bin(key, range);
    if (bin >= 0) atomic_add(fine + bin, 1);
  });
  sync_block();
  Bracket bracket = bracket_of(fine, range, ranks, total);
  int below = 0, inside = 0;
  each([&](uint32_t key) {
    below += key < bracket.low;
    inside += key >= bracket.low && key < bracket.high;
  });
  const int last = scan_lanes(inside);
  int at = 0;
  if (lane_id() == kLanes - 1) at = atomic_add(state + 1, last);
  at = shuffle(at, kLanes - 1) + last - inside;
  below = sum_lanes(below);
  if (lane_id() == 0) atomic_add(state, below);
  bracket = {forget(bracket.low), forget(bracket.high)};
  each([&](uint32_t key) {
    if (key >= bracket.low && key < bracket.high) {
      if (at < Form::kRoom) candidates[at] = key;
      ++at;
    }
  });
  sync_block();
  below = state[0];
  inside = state[1];
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += Form::kThreads) fine[i] = 0;
  sync_block();
  if (below < wanted && wanted <= below + inside && inside <= Form::kRoom && !force_miss) {
    const auto collected = [&](const auto& f) {
      for (int i = static_cast<int>(threadIdx.x); i < inside; i += Form::kThreads) f(candidates[i]);
    };
    const int bits = 32 - leading_zeros(bracket.high - bracket.low - 1);
    return float_of(radix_select(collected, bracket.low, bits, wanted - below, fine, state));
  }
  return float_of(radix_select(each, 0u, 32, wanted, fine, state));
}

// One block per multiprocessor or a few; each takes heads blockIdx.x, blockIdx.x + gridDim.x, ...
template <class T, int kSize, int kSteps, int kBefore>
GTP_GLOBAL(RegisterForm<kSize, kSteps>::kThreads, RegisterForm<kSize, kSteps>::kBlocks)
attention_in_registers(GTP_CONSTANT MapParams p) {
  using Form = RegisterForm<kSize, kSteps>;
  using Tiles = Tile<kSize>;
  constexpr int kTiles = 2 * kSteps;
  GTP_SHARED(memory);
  unsigned char* const q = memory;
  unsigned char* const k = q + Tiles::bytes(Form::kTokens);
  unsigned char* const v = k + Tiles::bytes(Form::kTokens);
  float* const log_scales = reinterpret_cast<float*>(v + Tiles::bytes(Form::kTokens));
  float* const cls_row = log_scales + Form::kTokens;
  int* const scratch = reinterpret_cast<int*>(cls_row + Form::kTokens);

  const int warp = warp_id(), lane = lane_id();
  const int tokens = static_cast<int>(p.a.tokens), size = static_cast<int>(p.a.head_size);
  const auto load = [&](unsigned char* tile, const void* array, const int64_t (&stride)[4], bool vectors,
                        unsigned head) {
    if (head >= p.heads) return;
    const void* const source = head_of(array, stride, head, p.image_heads);
    Tiles::load(tile, Form::kTokens, source, stride[2], stride[3], vectors, 0, tokens, size);
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
  // f(value of the map, half, tile, key); half says which of the two queries.
  RegisterMap<Form> s;
  const auto each = [&](const auto& f) {
    const int t = forget(lane) % 4;
    GTP_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      GTP_UNROLL
      for (int i = 0; i < 4; ++i) f(s[tile][i], i / 2, tile, 8 * tile + 2 * t + i % 2);
    }
  };

  load_keys(blockIdx.x);
  load_values(blockIdx.x);
  GTP_NO_UNROLL
  for (unsigned head = blockIdx.x; head < p.heads; head += gridDim.x) {
    const int g = forget(lane) / 4, first = 16 * warp + g;  // this lane's queries are this one and first + 8
    load_log_scales(log_scales, p, head / p.image_heads, 0, Form::kTokens);
    wait_copies<1>();
    sync_block();
    each([](float& value, int, int, int) { value = 0; });
    multiply_keys<T, kSize, kSteps>(s, q, 16 * warp, k);
    sync_block();
    load_keys(head + gridDim.x);

    // Softmax: each query's values are in the four lanes of its g.
    float largest[2] = {-kInfinity, -kInfinity}, sum[2] = {};
    each([&](float& value, int half, int, int key) {
      value = fmaf(value, p.scale_log2, log_scales[key]);
      largest[half] = fmaxf(largest[half], value);
    });
    GTP_UNROLL
    for (int half = 0; half < 2; ++half) largest[half] = max_lanes<4>(largest[half]);
    each([&](float& value, int half, int, int) {
      value = exp2_fast(value - largest[half]);
      sum[half] += value;
    });
    GTP_UNROLL
    for (int half = 0; half < 2; ++half) sum[half] = 1.0f / sum_lanes<4>(sum[half]);
    // What pads the map to whole tiles is zero, in a row of NaN too.
    each([&](float& value, int half, int tile, int key) {
      const bool is_value = first + 8 * half < tokens && (tile < 2 * kBefore || key < tokens);
      value = is_value ? value * sum[half] : 0.0f;
    });

    if (p.a.rank > 0) {
      const float threshold = threshold_in_registers<Form>(s, p.a.rank, p.a.tokens, p.a.force_miss, scratch);
      sync_block();
      // NaN is not below a threshold and stays, as does everything where the threshold is NaN.
      each([&](float& value, int, int, int) { value = value < threshold ? 0.0f : value; });
    }

    // The sums of what is left.
    float* const sums = reinterpret_cast<float*>(scratch);
    GTP_UNROLL
    for (int tile = 0; tile < kTiles; tile += 4) {
      float u[8];
      GTP_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int of = tile + i / 2 < kTiles ? tile + i / 2 : 0;
        u[i] = tile + i / 2 < kTiles ? s[of][i % 2] + s[of][i % 2 + 2] : 0.0f;
      }
      const float column = sum_columns(u);
      const int key = 8 * tile + column_of_lane();
      if (key < Form::kTokens) sums[warp * Form::kTokens + key] = column;
    }
    // On the diagonal, lane (g, t) has a value where t is g / 2: of the pair g % 2 of query g against keys 0 to 7, and
    // of query g + 8 against keys 8 to 15.
    float on_diagonal[2] = {};
    each([&](float& value, int half, int tile, int key) {
      if (tile / 2 == warp && tile % 2 == half && (key & 1) == (g & 1)) on_diagonal[half] = value;
    });
    float* const diag = static_cast<float*>(p.a.diag) + static_cast<int64_t>(head) * tokens;
    GTP_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (lane % 4 == g / 2 && first + 8 * half < tokens) diag[first + 8 * half] = on_diagonal[half];
    }
    if (first == 0) {
      each([&](float& value, int half, int, int key) {
        if (half == 0) cls_row[key] = value;
      });
    }

    uint32_t packed[kSteps][4];
    GTP_UNROLL
    for (int step = 0; step < kSteps; ++step) pack_tiles<T>(packed[step], s[2 * step], s[2 * step + 1]);
    wait_copies<1>();
    sync_block();
    // 32 dimensions at a time: their sums fit the registers beside the packed map.
    const auto multiply_part = [&](auto from, auto pairs) {
      constexpr int kFrom = decltype(from)::value, kPairs = decltype(pairs)::value;
      if constexpr (kPairs > 0) {
        float out[2 * kPairs][4] = {};
        GTP_UNROLL
        for (int step = 0; step < kSteps; ++step) {
          multiply_values<T, kSize, kFrom, kPairs>(out, packed[step], v, 16 * step);
        }
        store_out<T, kFrom, kPairs>(p, head, first, out);
      }
    };
    constexpr int kPairs = kSize / 16;
    multiply_part(Number<0>(), Number<2>());
    multiply_part(Number<2>(), Number<(kPairs < 4 ? kPairs - 2 : 2)>());
    multiply_part(Number<4>(), Number<(kPairs < 4 ? 0 : kPairs < 6 ? kPairs - 4 : 2)>());
    multiply_part(Number<6>(), Number<(kPairs < 6 ? 0 : kPairs - 6)>());
    const int64_t scores = static_cast<int64_t>(head) * tokens;
    for (int key = static_cast<int>(threadIdx.x); key < tokens; key += Form::kThreads) {
      float total = 0;
      GTP_UNROLL
      for (int w = 0; w < kSteps; ++w) total += sums[w * Form::kTokens + key];
      static_cast<float*>(p.a.colsum)[scores + key] = total;
      static_cast<float*>(p.a.cls_row)[scores + key] = cls_row[key];
    }
    sync_block();
    load_values(head + gridDim.x);
  }
}

}  // namespace cuda
}  // namespace gtp
