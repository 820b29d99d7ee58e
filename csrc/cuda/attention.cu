// attention_with_scores on a GPU: which form takes which shape, and the launches.

#include "cuda/attention.cuh"
#include "cuda/attention_sweep.cuh"
#include "cuda/launch.cuh"

namespace gtp {
namespace cuda {
namespace {

bool whole_vectors(const void* data, const int64_t (&stride)[4], int64_t size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride[0] % 8 == 0 && stride[1] % 8 == 0 &&
         stride[2] % 8 == 0 && stride[3] == 1 && size % 8 == 0;
}

MapParams map_params(const AttentionParams& a, void* workspace) {
  MapParams p;
  p.a = a;
  p.scale_log2 = static_cast<float>(a.scale * 1.4426950408889634);
  p.vectors[0] = whole_vectors(a.q, a.stride_q, a.head_size);
  p.vectors[1] = whole_vectors(a.k, a.stride_k, a.head_size);
  p.vectors[2] = whole_vectors(a.v, a.stride_v, a.head_size);
  p.heads = static_cast<unsigned>(a.batch * a.heads);
  p.image_heads = static_cast<unsigned>(a.heads);
  p.workspace = static_cast<unsigned char*>(workspace);
  p.row_blocks = static_cast<int>((a.tokens + kSweepRows - 1) / kSweepRows);
  p.room = static_cast<int>(24 * a.tokens + 1024);
  return p;
}

// The numbers of 16-key steps with kernels of their own: an N between two of them pays for the next.
template <int kHeadSize, int... kSteps>
struct Classes {
  static constexpr int kSize = kHeadSize;
};

// f(the classes of the smallest padded head size that holds `size`).
template <class F>
auto for_head_size(int64_t size, const F& f) {
  if (size <= 32) return f(Classes<32, 4, 8, 10, 12>());
  // The run of a model at 224 pixels: 197 tokens and what P in every block leaves of them.
  if (size <= 64) return f(Classes<64, 2, 4, 6, 7, 8, 9, 10, 11, 12>());
  if (size <= 80) return f(Classes<80, 4, 8, 10, 12>());
  if (size <= 96) return f(Classes<96, 4, 8, 10, 12>());
  return f(Classes<128, 4, 8, 11>());
}

template <int kSize, int... kSteps>
bool fits_registers(Classes<kSize, kSteps...>, int64_t tokens, const Machine& m) {
  size_t bytes = 0;
  const bool found = ((tokens <= 16 * kSteps && (bytes = RegisterForm<kSize, kSteps>::kBytes, true)) || ...);
  return found && bytes <= static_cast<size_t>(m.shared_bytes);
}

template <class T, int kSize, int kBefore, int kSteps, int... kMore>
bool in_registers(const MapParams& p, const Machine& m, void* stream, Error& error) {
  using Form = RegisterForm<kSize, kSteps>;
  if constexpr (sizeof...(kMore) > 0) {
    if (p.a.tokens > Form::kTokens) return in_registers<T, kSize, kSteps, kMore...>(p, m, stream, error);
  }
  const int64_t most = static_cast<int64_t>(m.multiprocessors) * Form::kBlocks;
  const Launch l = {"attention_in_registers", p.heads < most ? p.heads : most, 1, Form::kThreads, Form::kBytes};
  return launch(attention_in_registers<T, kSize, kSteps, kBefore>, p, l, stream, error);
}

template <class T, int kSize>
bool by_sweeps(const MapParams& p, void* stream, Error& error) {
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
    const ZeroParams zero = {reinterpret_cast<int*>(p.workspace), static_cast<int64_t>(counters / sizeof(int))};
    const int64_t blocks = (zero.count + 1023) / 1024;
    if (!launch(zero_counters, zero, {"zero_counters", blocks < 1024 ? blocks : 1024, 1, 256, 0}, stream, error)) {
      return false;
    }
  }
  if (!sweep("attention_statistics", attention_statistics<T, kSize>, kBytes)) return false;
  if (p.a.rank > 0) {
    if (!sweep("attention_fine", attention_fine<T, kSize>, kBytes)) return false;
    if (!sweep("attention_collect", attention_collect<T, kSize>, kBytes)) return false;
    if (!launch(attention_select<T, kSize>, p, {"attention_select", p.heads, 1, kSweepThreads, kBytes}, stream,
                error)) {
      return false;
    }
  }
  return sweep("attention_output", attention_output<T, kSize>, Sweep<kSize>::kOutputBytes) &&
         launch(attention_columns, p, {"attention_columns", (p.a.tokens + 255) / 256, p.heads, 256, 0}, stream, error);
}

template <class T, int kSize, int... kSteps>
bool run(Classes<kSize, kSteps...> classes, const MapParams& p, void* stream, Error& error) {
  Machine m;
  if (!machine(m, error)) return false;
  if (fits_registers(classes, p.a.tokens, m)) return in_registers<T, kSize, 0, kSteps...>(p, m, stream, error);
  return by_sweeps<T, kSize>(p, stream, error);
}

}  // namespace

size_t attention_workspace(const AttentionParams& a) {
  Machine m;
  Error error;
  const auto fits = [&](auto classes) { return fits_registers(classes, a.tokens, m); };
  if (!machine(m, error) || for_head_size(a.head_size, fits)) return 0;
  Workspace w;
  size_t counters;
  return place_workspace(map_params(a, nullptr), nullptr, w, counters);
}

bool attention(const AttentionParams& a, void* workspace, void* stream, Error& error) {
  if (a.batch == 0 || a.heads == 0 || a.tokens == 0) return true;
  if (a.head_size > 128 || (a.dtype != DType::BFloat16 && a.dtype != DType::Float16)) {
    std::snprintf(error.text, sizeof error.text,
                  "the attention of the backend cuda takes float16 and bfloat16 and head sizes up to 128; d is %lld",
                  static_cast<long long>(a.head_size));
    return false;
  }
  if (a.tokens > 32768) {
    std::snprintf(error.text, sizeof error.text, "N is %lld; the attention of the backend cuda takes up to 32,768",
                  static_cast<long long>(a.tokens));
    return false;
  }
  if (a.batch * a.heads > 0x7fffffff) {
    std::snprintf(error.text, sizeof error.text, "B * H is %lld; it must be below 2^31",
                  static_cast<long long>(a.batch * a.heads));
    return false;
  }
  const MapParams p = map_params(a, workspace);
  return for_head_size(a.head_size, [&](auto classes) {
    return a.dtype == DType::BFloat16 ? run<BFloat16>(classes, p, stream, error)
                                      : run<Float16>(classes, p, stream, error);
  });
}

}  // namespace cuda
}  // namespace gtp
