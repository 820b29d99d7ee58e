// Which form of the attention takes which shape, and the launches: for one type, as each has a source of its own.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/attention_sweep.cuh"
#include "cuda/launch.cuh"

namespace gtp {
namespace cuda {

bool attention_bfloat16(const MapParams& p, void* stream, Error& error);
bool attention_float16(const MapParams& p, void* stream, Error& error);
// Of the sweeps, whatever the type: counters to zero, and the column sums of blocks of queries to those of all.
bool zero_counters(int* counters, int64_t count, void* stream, Error& error);
bool sum_column_blocks(const MapParams& p, void* stream, Error& error);

// The numbers of 8-key tiles with kernels of their own: an N between two of them pays for the next.
template <int kHeadSize, int... kTiles>
struct Classes {
  static constexpr int kSize = kHeadSize;
};

// f(the classes of the smallest padded head size that holds `size`).
template <class F>
auto for_head_size(int64_t size, const F& f) {
  if (size <= 32) return f(Classes<32, 8, 16, 24, 26>());
  // The run of a model at 224 pixels: 197 tokens and what P in every block leaves of them.
  if (size <= 64) return f(Classes<64, 4, 8, 12, 14, 16, 18, 20, 22, 24, 25, 26>());
  if (size <= 80) return f(Classes<80, 8, 16, 24, 26>());
  if (size <= 96) return f(Classes<96, 8, 16, 24, 26>());
  return f(Classes<128, 8, 16, 24, 25>());
}

// What a block may have of shared memory: on sm_86, 89 and 120, on sm_80, on sm_90 and 100.
static_assert(RegisterForm<32, 26>::kBytes <= 99 * 1024 && RegisterForm<64, 26>::kBytes <= 99 * 1024);
static_assert(RegisterForm<80, 26>::kBytes <= 163 * 1024 && RegisterForm<96, 26>::kBytes <= 163 * 1024);
static_assert(RegisterForm<128, 25>::kBytes <= 227 * 1024);

template <int kSize, int... kTiles>
bool fits_registers(Classes<kSize, kTiles...>, int64_t tokens, const Machine& m) {
  size_t bytes = 0;
  const bool found = ((tokens <= 8 * kTiles && (bytes = RegisterForm<kSize, kTiles>::kBytes, true)) || ...);
  return found && bytes <= static_cast<size_t>(m.shared_bytes);
}

template <class T, int kSize, int kBefore, int kTiles, int... kMore>
bool in_registers(const MapParams& p, const Machine& m, void* stream, Error& error) {
  using Form = RegisterForm<kSize, kTiles>;
  if constexpr (sizeof...(kMore) > 0) {
    if (p.a.tokens > 8 * kTiles) return in_registers<T, kSize, kTiles, kMore...>(p, m, stream, error);
  }
  const int64_t most = static_cast<int64_t>(m.multiprocessors) * Form::kBlocks;
  const Launch l = {"attention_in_registers", p.heads < most ? p.heads : most, 1, Form::kThreads, Form::kBytes};
  MapParams ranked = p;
  if (p.a.rank > 0) {
    // The zeros that pad the map are below the threshold, in the sample too.
    const int64_t tokens = p.a.tokens;
    const int values = Form::sampled(static_cast<int>(tokens)), zeros = Form::sampled(Form::kTokens) - values;
    ranked.wanted = static_cast<int>(p.a.rank + Form::kCount - tokens * tokens);
    ranked.ranks = sample_ranks(p.a.rank, tokens * tokens, values);
    ranked.ranks.low += zeros;
    ranked.ranks.high += zeros;
  }
  return launch(attention_in_registers<T, kSize, kTiles, kBefore>, ranked, l, stream, error);
}

template <class T, int kSize>
bool by_sweeps(MapParams p, void* stream, Error& error) {
  // Heads are the second dimension of the grid, which is limited.
  if (p.heads > 65535) {
    std::snprintf(error.text, sizeof error.text, "B * H is %u; for this N and d it must be at most 65,535", p.heads);
    return false;
  }
  Workspace w;
  size_t counters = 0;
  place_workspace(p, p.workspace, w, counters);
  const auto sweep = [&](const char* name, void (*kernel)(MapParams), size_t bytes) {
    return launch(kernel, p, {name, p.row_blocks, p.heads, kSweepThreads, bytes}, stream, error);
  };
  constexpr size_t kBytes = Sweep<kSize>::kBytes;
  if (p.a.rank > 0) {
    p.wanted = static_cast<int>(p.a.rank);
    p.ranks = sample_ranks(p.a.rank, p.a.tokens * p.a.tokens, sampled(p.a.tokens));
    if (!zero_counters(reinterpret_cast<int*>(p.workspace), static_cast<int64_t>(counters / sizeof(int)), stream,
                       error)) {
      return false;
    }
  }
  if (!sweep("attention_statistics", attention_statistics<T, kSize>, kBytes)) return false;
  if (p.a.rank > 0) {
    if (!sweep("attention_fine", attention_fine<T, kSize>, kBytes)) return false;
    if (!sweep("attention_collect", attention_collect<T, kSize>, Sweep<kSize>::kCollectBytes)) return false;
    if (!launch(attention_select<T, kSize>, p, {"attention_select", p.heads, 1, kSweepThreads, kBytes}, stream,
                error)) {
      return false;
    }
  }
  return sweep("attention_output", attention_output<T, kSize>, Sweep<kSize>::kOutputBytes) &&
         sum_column_blocks(p, stream, error);
}

template <class T, int kSize, int... kTiles>
bool run(Classes<kSize, kTiles...> classes, const MapParams& p, void* stream, Error& error) {
  Machine m;
  if (!machine(m, error)) return false;
  if (fits_registers(classes, p.a.tokens, m)) return in_registers<T, kSize, 0, kTiles...>(p, m, stream, error);
  return by_sweeps<T, kSize>(p, stream, error);
}

template <class T>
bool run_attention(const MapParams& p, void* stream, Error& error) {
  return for_head_size(p.a.head_size, [&](auto classes) { return run<T>(classes, p, stream, error); });
}

}  // namespace cuda
}  // namespace gtp
