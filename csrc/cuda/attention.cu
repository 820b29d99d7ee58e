// attention_with_scores on a GPU: what does not depend on the type. attention_*.cu have the kernels that do.

#include "cuda/attention_run.cuh"

namespace gtp {
namespace cuda {
namespace {

struct ZeroParams {
  int* target;
  int64_t count;
};
GTP_GLOBAL(256, 1) zero_ints(GTP_CONSTANT ZeroParams p) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * gridDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count; i += step) p.target[i] = 0;
}

// grid: (blocks of 256 keys, heads of all images).
GTP_GLOBAL(256, 1)
attention_columns(GTP_CONSTANT MapParams p) {
  Workspace w;
  size_t counters;
  place_workspace(p, p.workspace, w, counters);
  const int64_t key = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, head = blockIdx.y;
  if (key >= p.a.tokens) return;
  float total = 0;
  for (int block = 0; block < p.row_blocks; ++block) total += w.sums[(head * p.row_blocks + block) * p.a.tokens + key];
  static_cast<float*>(p.a.colsum)[head * p.a.tokens + key] = total;
}

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
  set_image_heads(p, static_cast<unsigned>(a.heads));
  p.workspace = static_cast<unsigned char*>(workspace);
  p.row_blocks = static_cast<int>((a.tokens + kSweepRows - 1) / kSweepRows);
  p.room = static_cast<int>(24 * a.tokens + 1024);
  return p;
}

}  // namespace

bool zero_counters(int* counters, int64_t count, void* stream, Error& error) {
  const int64_t blocks = (count + 1023) / 1024;
  const Launch l = {"zero_ints", blocks < 1024 ? blocks : 1024, 1, 256, 0};
  return launch(zero_ints, ZeroParams{counters, count}, l, stream, error);
}

bool sum_column_blocks(const MapParams& p, void* stream, Error& error) {
  const Launch l = {"attention_columns", (p.a.tokens + 255) / 256, p.heads, 256, 0};
  return launch(attention_columns, p, l, stream, error);
}

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
  return a.dtype == DType::BFloat16 ? attention_bfloat16(p, stream, error) : attention_float16(p, stream, error);
}

}  // namespace cuda
}  // namespace gtp
