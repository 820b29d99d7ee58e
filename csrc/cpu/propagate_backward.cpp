// The backward of propagate in x.

#include "dtype.h"
#include "image_graph.h"
#include "kernels.h"
#include "scratch.h"
#include "vec.h"

namespace gtp {
namespace GTP_ISA {
namespace {

// target += value * source
template <class A>
void add_row(A* target, const A* source, A value, int64_t count) {
  for (int64_t c = 0; c < count; ++c) target[c] += value * source[c];
}

// Columns begin to end of one image: the gradient of the kept rows is copied, that of the rows that left gathers
// over the edges in the order of index_kept.
template <class A>
bool backward_columns(const PropagateBackwardParams& p, int64_t b, int64_t begin, int64_t end, int32_t* leaver,
                      A* row_buffer, A* sums) {
  const int64_t width = end - begin;
  const int64_t size = size_of(p.grad.dtype);
  const int64_t* index_kept = p.index_kept + b * p.kept;
  const int64_t* index_prop = p.index_prop + b * p.prop;
  const auto target_at = [&](int64_t row) { return (b * p.tokens + row) * p.channels + begin; };
  const auto source_at = [&](int64_t row) { return b * p.grad.stride_b + row * p.grad.stride_n + begin; };
  char* target = static_cast<char*>(p.grad_x);
  for (int64_t row = p.prefix; row < p.tokens; ++row) {
    std::memset(target + target_at(row) * size, 0, static_cast<size_t>(width * size));
  }
  for (int64_t r = 0; r < p.prefix + p.kept; ++r) {
    const int64_t row = r < p.prefix ? r : index_kept[r - p.prefix];
    std::memcpy(target + target_at(row) * size, static_cast<const char*>(p.grad.data) + source_at(r) * size,
                static_cast<size_t>(width * size));
  }
  if (p.prop == 0 || p.standard == Standard::None) return true;
  if (p.standard == Standard::Mean) {
    const A* g = load_row(p.grad.data, p.grad.dtype, source_at(p.prefix + p.kept), 1, width, row_buffer);
    for (int64_t c = 0; c < width; ++c) sums[c] = g[c] / static_cast<A>(p.prop);
    for (int64_t j = 0; j < p.prop; ++j) store_row(sums, p.grad_x, p.grad.dtype, target_at(index_prop[j]), width);
    return true;
  }
  const ImageGraph graph(p.graph, b, p.tokens - p.prefix, p.prefix, index_prop, p.prop, leaver);
  for (int64_t i = 0; i < p.prop * width; ++i) sums[i] = 0;
  for (int64_t k = 0; k < p.kept; ++k) {
    const A* g = nullptr;
    const bool ok = graph.walk(index_kept[k], [&](int64_t j, float value) {
      if (!g) g = load_row(p.grad.data, p.grad.dtype, source_at(p.prefix + k), 1, width, row_buffer);
      add_row(sums + j * width, g, static_cast<A>(value), width);
    });
    if (!ok) return false;
  }
  const A alpha = static_cast<A>(p.alpha);
  for (int64_t j = 0; j < p.prop; ++j) {
    A* sum = sums + j * width;
    for (int64_t c = 0; c < width; ++c) sum[c] *= alpha;
    store_row(sum, p.grad_x, p.grad.dtype, target_at(index_prop[j]), width);
  }
  return true;
}

template <class A>
bool run_backward(const PropagateBackwardParams& p, const Parallel& parallel, Error& error) {
  constexpr int64_t kColumns = 256;
  const int64_t blocks = (p.channels + kColumns - 1) / kColumns;
  int failed = 0;
  auto body = [&](int64_t begin, int64_t end) {
    const int64_t rows = p.prop > 0 ? p.prop : 1;
    Scratch scratch(Scratch::bytes<int32_t>(p.graph.origins) + Scratch::bytes<A>(kColumns) +
                    Scratch::bytes<A>(rows * kColumns));
    int32_t* leaver = scratch.take<int32_t>(p.graph.origins);
    A* row_buffer = scratch.take<A>(kColumns);
    A* sums = scratch.take<A>(rows * kColumns);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t % blocks * kColumns;
      const int64_t last = first + kColumns < p.channels ? first + kColumns : p.channels;
      if (!backward_columns(p, t / blocks, first, last, leaver, row_buffer, sums)) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      }
    }
  };
  parallel_for(parallel, p.batch * blocks, 1, body);
  return take_failure(failed, error);
}

}  // namespace

bool propagate_backward(const PropagateBackwardParams& p, const Parallel& parallel, Error& error) {
  if (!check_selection(p, error)) return false;
  if (p.standard == Standard::GraphProp && !check_token(p.graph, p.batch, p.tokens - p.prefix, error)) return false;
  return p.grad.dtype == DType::Float64 ? run_backward<double>(p, parallel, error)
                                        : run_backward<float>(p, parallel, error);
}

}  // namespace GTP_ISA
}  // namespace gtp
