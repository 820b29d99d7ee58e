// token_importance and select_tokens.
//
// Importance reads 4 bytes per token and head of each source and writes 4 bytes per token. The order by importance has
// one thread per token, which counts its rank and stores its index there; the grid order has one block per image. Both
// read 4 bytes per token, once per block, and write 8.

#include "cuda/select.cuh"

#include "cuda/launch.cuh"

namespace gtp {
namespace cuda {
namespace {

constexpr int kTokens = 128;  // threads of a block with one token each
constexpr int kTile = 2048;   // keys in shared memory at a time

GTP_GLOBAL(kTokens, 1) importance_kernel(GTP_CONSTANT ImportanceParams p) {
  const int64_t count = p.tokens - p.prefix;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x;
  if (at >= p.batch * count) return;
  static_cast<float*>(p.importance)[at] = importance_of(p, at / count, at % count);
}

// By falling importance. grid: images x tokens / kTokens; shared memory: one tile of keys.
GTP_GLOBAL(kTokens, 1) rank_kernel(GTP_CONSTANT SelectParams p) {
  GTP_SHARED(shared);
  auto* const keys = reinterpret_cast<uint32_t*>(shared);
  const int count = static_cast<int>(p.count), kept = static_cast<int>(p.count - p.prop);
  const int64_t b = blockIdx.x;
  const float* const importance = static_cast<const float*>(p.importance) + b * p.count;
  const int i = static_cast<int>(blockIdx.y * kTokens + threadIdx.x);
  const uint32_t key = i < count ? ordered_key(importance[i]) : 0;
  int rank = 0;
  for (int first = 0; first < count; first += kTile) {
    const int size = count - first < kTile ? count - first : kTile;
    if (first > 0) sync_block();
    fill_keys(keys, size, [=](int j) { return importance[first + j]; });
    sync_block();
    rank += count_before(keys, first, static_cast<int>(padded_keys(size)), i, key);
  }
  if (i >= count) return;
  int64_t* const target = rank < kept ? p.index_kept + b * kept + rank : p.index_prop + b * p.prop + (rank - kept);
  *target = i + p.prefix;
}

struct OrderParams {
  SelectParams select;
  bool shared_keys;
};

// By index. grid: images; shared memory: 64 integers, and the keys where they fit.
GTP_GLOBAL(1024, 1) order_kernel(GTP_CONSTANT OrderParams order) {
  GTP_SHARED(shared);
  const SelectParams& p = order.select;
  auto* const scratch = reinterpret_cast<int*>(shared);
  auto* const keys = reinterpret_cast<uint32_t*>(shared + 64 * sizeof(int));
  const int count = static_cast<int>(p.count), kept = static_cast<int>(p.count - p.prop);
  const int64_t b = blockIdx.x;
  const float* const importance = static_cast<const float*>(p.importance) + b * p.count;
  if (order.shared_keys) {
    fill_keys(keys, count, [=](int i) { return importance[i]; });
    sync_block();
  }
  const Keys choice{order.shared_keys ? keys : nullptr, importance};
  select_in_block(choice, count, kept, true, scratch, [&](int i, int position) {
    int64_t* const target =
        position < kept ? p.index_kept + b * kept + position : p.index_prop + b * p.prop + (position - kept);
    *target = i + p.prefix;
  });
}

bool only_float32(const char* what, DType dtype, Error& error) {
  if (dtype == DType::Float32) return true;
  std::snprintf(error.text, sizeof error.text, "the CUDA kernel %s takes float32 only", what);
  return false;
}

}  // namespace

bool token_importance(const ImportanceParams& p, void* stream, Error& error) {
  if (!only_float32("token_importance", p.dtype, error)) return false;
  const int64_t values = p.batch * (p.tokens - p.prefix);
  if (values <= 0 || p.heads <= 0) return true;
  return launch(importance_kernel, p, {"token_importance", (values + kTokens - 1) / kTokens, 1, kTokens, 0}, stream,
                error);
}

bool select_tokens(const SelectParams& p, void* stream, Error& error) {
  if (!only_float32("select_tokens", p.dtype, error)) return false;
  if (p.batch <= 0 || p.count <= 0) return true;
  if (!p.by_index) {
    const size_t bytes = sizeof(uint32_t) * static_cast<size_t>(padded_keys(p.count < kTile ? p.count : kTile));
    return launch(rank_kernel, p, {"select_tokens", p.batch, (p.count + kTokens - 1) / kTokens, kTokens, bytes}, stream,
                  error);
  }
  Machine m;
  if (!machine(m, error)) return false;
  const size_t scratch = 64 * sizeof(int), keys = sizeof(uint32_t) * static_cast<size_t>(padded_keys(p.count));
  const OrderParams order{p, scratch + keys <= static_cast<size_t>(m.shared_bytes)};
  const int threads = p.count <= kCounted ? 256 : 1024;
  return launch(order_kernel, order, {"select_tokens", p.batch, 1, threads, scratch + (order.shared_keys ? keys : 0)},
                stream, error);
}

}  // namespace cuda
}  // namespace gtp
