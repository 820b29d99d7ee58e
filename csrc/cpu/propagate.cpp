// propagate, its backward and dense forms, and the block transition residual + propagate + norm.
//
// Bound by memory: x (and branch) are read once, x_out (and normed) written once; 2 * C FLOPs per edge that counts. A
// task is a range of output rows; what it needs of an image (which original tokens left, and the rows behind them) is
// made when the range enters the image, a row of a token that left when the first edge asks for it. Every output row
// is computed whole by one thread in one order.

#include <cstdio>
#include <cstring>

#include "dtype.h"
#include "kernels.h"
#include "scratch.h"
#include "vec.h"

namespace gtp {
namespace GTP_ISA {
namespace {

const char kBadGraph[] =
    "indptr and indices: each row must be a range indptr[t] <= indptr[t + 1] within [0, E], of columns in [0, n0)";

bool check_index(const char* name, const int64_t* index, int64_t batch, int64_t count, int64_t low, int64_t high,
                 Error& error) {
  for (int64_t i = 0; i < batch * count; ++i) {
    if (index[i] < low || index[i] >= high) {
      std::snprintf(error.text, sizeof error.text, "%s[%lld, %lld] is %lld; it must be in [%lld, %lld)", name,
                    static_cast<long long>(i / count), static_cast<long long>(i % count),
                    static_cast<long long>(index[i]), static_cast<long long>(low), static_cast<long long>(high));
      return false;
    }
  }
  return true;
}

bool check_token(const GraphView& graph, int64_t batch, int64_t count, Error& error) {
  for (int64_t i = 0; i < batch * count; ++i) {
    if (graph.token[i] < 0 || graph.token[i] >= graph.origins) {
      std::snprintf(error.text, sizeof error.text, "token[%lld, %lld] is %d; it must be in [0, %lld)",
                    static_cast<long long>(i / count), static_cast<long long>(i % count), graph.token[i],
                    static_cast<long long>(graph.origins));
      return false;
    }
  }
  return true;
}

// The graph of one image, and which of its original tokens leave.
struct ImageGraph {
  const int32_t *indptr, *indices, *token;
  const float* values;
  int64_t origins, capacity, prefix;
  int32_t* leaver;  // [origins]: the position in index_prop, or -1

  ImageGraph(const GraphView& graph, int64_t b, int64_t count, int64_t prefix_, const int64_t* index_prop, int64_t prop,
             int32_t* leaver_)
      : indptr(graph.indptr + b * (graph.origins + 1)),
        indices(graph.indices + b * graph.capacity),
        token(graph.token + b * count),
        values(graph.values + b * graph.capacity),
        origins(graph.origins),
        capacity(graph.capacity),
        prefix(prefix_),
        leaver(leaver_) {
    std::memset(leaver, 0xff, static_cast<size_t>(origins) * sizeof(int32_t));
    for (int64_t j = 0; j < prop; ++j) leaver[token[index_prop[j] - prefix]] = static_cast<int32_t>(j);
  }

  // edge(j, value) for every edge from the token behind row `row` to a token that leaves; false for a bad CSR.
  template <class Edge>
  bool walk(int64_t row, Edge edge) const {
    const int32_t t = token[row - prefix];
    const int64_t begin = indptr[t], end = indptr[t + 1];
    if (begin < 0 || end < begin || end > capacity) return false;
    // Which edges count is gathered without a branch, 64 edges at a time: few do, and none predictably.
    for (int64_t e = begin; e < end; e += 64) {
      const int64_t chunk = end - e < 64 ? end - e : 64;
      uint64_t counts = 0;
      bool bad = false;
      for (int64_t i = 0; i < chunk; ++i) {
        const uint32_t column = static_cast<uint32_t>(indices[e + i]);
        const bool inside = column < static_cast<uint64_t>(origins);
        bad |= !inside;
        counts |= static_cast<uint64_t>(leaver[inside ? column : 0] >= 0) << i;
      }
      if (bad) return false;
      for (; counts; counts &= counts - 1) {
        const int64_t at = e + __builtin_ctzll(counts);
        edge(leaver[indices[at]], values[at]);
      }
    }
    return true;
  }
};

// target = value * source on the first edge, target += value * source on the others.
template <class A>
void add_row(A* target, const A* source, A value, int64_t count, bool first) {
  if (first) {
    for (int64_t c = 0; c < count; ++c) target[c] = value * source[c];
  } else {
    for (int64_t c = 0; c < count; ++c) target[c] += value * source[c];
  }
}

template <class A>
A sum_row(const A* row, int64_t count) {
  constexpr int W = Vec<A>::W;
  typename Vec<A>::V s0{}, s1{};
  int64_t c = 0;
  for (; c + 2 * W <= count; c += 2 * W) {
    s0 += load(row + c);
    s1 += load(row + c + W);
  }
  A sum = reduce_sum<A>(s0 + s1);
  for (; c < count; ++c) sum += row[c];
  return sum;
}

template <class A>
A sum_of_squares(const A* row, A mean, int64_t count) {
  constexpr int W = Vec<A>::W;
  const auto m = splat(mean);
  typename Vec<A>::V s0{}, s1{};
  int64_t c = 0;
  for (; c + 2 * W <= count; c += 2 * W) {
    const auto d0 = load(row + c) - m, d1 = load(row + c + W) - m;
    s0 += d0 * d0;
    s1 += d1 * d1;
  }
  A sum = reduce_sum<A>(s0 + s1);
  for (; c < count; ++c) sum += (row[c] - mean) * (row[c] - mean);
  return sum;
}

template <class A>
struct Transition {
  const PropagateParams& p;
  const int64_t channels, rows_out, count;
  const A *layer_scale = nullptr, *weight = nullptr, *bias = nullptr;
  A *x_row, *branch_row, *y_row, *total, *result, *reread, *normed, *leaving, *parameters;
  int32_t* leaver;
  bool* ready;

  explicit Transition(const PropagateParams& params)
      : p(params), channels(p.channels), rows_out(p.rows_out()), count(p.tokens - p.prefix) {}

  bool uses_graph() const {
    return p.standard == Standard::GraphProp && p.prop > 0;
  }
  int64_t leaving_rows() const {
    return uses_graph() && p.branch.data ? p.prop : 0;
  }

  size_t bytes() const {
    return 7 * Scratch::bytes<A>(channels) + Scratch::bytes<A>(leaving_rows() * channels) +
           3 * Scratch::bytes<A>(channels) + Scratch::bytes<int32_t>(p.graph.origins) + Scratch::bytes<bool>(p.prop);
  }

  void carve(Scratch& scratch) {
    x_row = scratch.take<A>(channels);
    branch_row = scratch.take<A>(channels);
    y_row = scratch.take<A>(channels);
    total = scratch.take<A>(channels);
    result = scratch.take<A>(channels);
    reread = scratch.take<A>(channels);
    normed = scratch.take<A>(channels);
    leaving = scratch.take<A>(leaving_rows() * channels);
    layer_scale = vector(p.layer_scale, scratch.take<A>(channels));
    weight = vector(p.norm_weight, scratch.take<A>(channels));
    bias = vector(p.norm_bias, scratch.take<A>(channels));
    leaver = scratch.take<int32_t>(p.graph.origins);
    ready = scratch.take<bool>(p.prop);
  }

  const A* vector(const Vector& v, A* buffer) const {
    return v.data ? load_row(v, channels, buffer) : nullptr;
  }

  // y of one input row: the row itself where it needs no arithmetic, otherwise in `target`.
  const A* y_of(int64_t b, int64_t row, A* target) {
    if (!p.branch.data) return load_row(p.x, b, row, channels, target);
    const A* x = load_row(p.x, b, row, channels, x_row);
    const A* branch = load_row(p.branch, b, row, channels, branch_row);
    if (layer_scale) {
      for (int64_t c = 0; c < channels; ++c) target[c] = x[c] + layer_scale[c] * branch[c];
    } else {
      for (int64_t c = 0; c < channels; ++c) target[c] = x[c] + branch[c];
    }
    return target;
  }

  const A* y_of_leaver(int64_t b, int64_t j, const int64_t* index_prop) {
    if (!p.branch.data) return y_of(b, index_prop[j], branch_row);
    A* row = leaving + j * channels;
    if (!ready[j]) y_of(b, index_prop[j], row);
    ready[j] = true;
    return row;
  }

  void write_norm(const A* row, int64_t offset) {
    const A n = static_cast<A>(channels);
    const A mean = p.norm == Norm::Layer ? sum_row(row, channels) / n : A(0);
    const A variance = sum_of_squares(row, mean, channels) / n;
    const A scale = A(1) / root(variance + static_cast<A>(p.norm_eps));
    A* target =
        p.out_dtype == (sizeof(A) == 4 ? DType::Float32 : DType::Float64) ? static_cast<A*>(p.normed) + offset : normed;
    if (weight && bias) {
      for (int64_t c = 0; c < channels; ++c) target[c] = (row[c] - mean) * scale * weight[c] + bias[c];
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        A value = (row[c] - mean) * scale;
        if (weight) value *= weight[c];
        if (bias) value += bias[c];
        target[c] = value;
      }
    }
    if (target == normed) store_row(target, p.normed, p.out_dtype, offset, channels);
  }

  void write(const A* row, int64_t offset) {
    store_row(row, p.x_out, p.out_dtype, offset, channels);
    if (p.norm != Norm::None) write_norm(load_row(p.x_out, p.out_dtype, offset, 1, channels, reread), offset);
  }

  // Rows begin to end of all images' output rows; false for a bad CSR.
  bool run(int64_t begin, int64_t end) {
    bool ok = true;
    for (int64_t at = begin; at < end;) {
      const int64_t b = at / rows_out, first = at % rows_out;
      const int64_t last = end - b * rows_out < rows_out ? end - b * rows_out : rows_out;
      const int64_t* index_kept = p.index_kept + b * p.kept;
      const int64_t* index_prop = p.index_prop + b * p.prop;
      if (uses_graph()) {
        const ImageGraph graph(p.graph, b, count, p.prefix, index_prop, p.prop, leaver);
        std::memset(ready, 0, static_cast<size_t>(p.prop));
        for (int64_t r = first; r < last; ++r) ok &= one_row(b, r, &graph, index_kept, index_prop);
      } else {
        for (int64_t r = first; r < last; ++r) ok &= one_row(b, r, nullptr, index_kept, index_prop);
      }
      at += last - first;
    }
    return ok;
  }

  bool one_row(int64_t b, int64_t r, const ImageGraph* graph, const int64_t* index_kept, const int64_t* index_prop) {
    const int64_t offset = (b * rows_out + r) * channels;
    if (r == p.prefix + p.kept) {
      for (int64_t j = 0; j < p.prop; ++j) add_row(total, y_of(b, index_prop[j], y_row), A(1), channels, j == 0);
      const A n = static_cast<A>(p.prop);
      for (int64_t c = 0; c < channels; ++c) result[c] = total[c] / n;
      write(result, offset);
      return true;
    }
    const int64_t row = r < p.prefix ? r : index_kept[r - p.prefix];
    int64_t edges = 0;
    if (graph && r >= p.prefix) {
      const bool ok = graph->walk(row, [&](int64_t j, float value) {
        add_row(total, y_of_leaver(b, j, index_prop), static_cast<A>(value), channels, edges++ == 0);
      });
      if (!ok) return false;
    }
    if (edges == 0 && !p.branch.data && p.x.dtype == p.out_dtype) {
      const int64_t size = size_of(p.out_dtype);
      const int64_t from = b * p.x.stride_b + row * p.x.stride_n;
      std::memcpy(static_cast<char*>(p.x_out) + offset * size, static_cast<const char*>(p.x.data) + from * size,
                  static_cast<size_t>(channels * size));
      if (p.norm != Norm::None) write_norm(load_row(p.x, b, row, channels, reread), offset);
      return true;
    }
    const A* y = y_of(b, row, y_row);
    if (edges > 0) {
      const A alpha = static_cast<A>(p.alpha);
      for (int64_t c = 0; c < channels; ++c) result[c] = y[c] + alpha * total[c];
      y = result;
    }
    write(y, offset);
    return true;
  }
};

// token_scales of one image; a scalar per row, in the type that they have.
template <class S>
bool propagate_scales(const PropagateParams& p, int64_t b, const ImageGraph* graph) {
  const S* scales = static_cast<const S*>(p.token_scales.data) + b * p.tokens;
  S* target = static_cast<S*>(p.scales_out) + b * p.rows_out();
  const int64_t* index_kept = p.index_kept + b * p.kept;
  const int64_t* index_prop = p.index_prop + b * p.prop;
  for (int64_t r = 0; r < p.prefix; ++r) target[r] = scales[r];
  for (int64_t k = 0; k < p.kept; ++k) {
    S total = 0;
    int64_t edges = 0;
    if (graph) {
      const bool ok = graph->walk(index_kept[k], [&](int64_t j, float value) {
        total += static_cast<S>(value) * scales[index_prop[j]];
        ++edges;
      });
      if (!ok) return false;
    }
    const S own = scales[index_kept[k]];
    target[p.prefix + k] = edges > 0 ? own + static_cast<S>(p.alpha) * total : own;
  }
  if (p.rows_out() > p.prefix + p.kept) {
    S total = 0;
    for (int64_t j = 0; j < p.prop; ++j) total += scales[index_prop[j]];
    target[p.prefix + p.kept] = total;
  }
  return true;
}

// The parts of an image that are not rows: token and token_scales.
bool finish_image(const PropagateParams& p, int64_t b, int32_t* leaver) {
  const int64_t count = p.tokens - p.prefix;
  if (p.standard == Standard::GraphProp) {
    for (int64_t k = 0; k < p.kept; ++k) {
      p.token_out[b * p.kept + k] = p.graph.token[b * count + p.index_kept[b * p.kept + k] - p.prefix];
    }
  }
  if (!p.token_scales.data) return true;
  const bool wide = p.token_scales.dtype == DType::Float64;
  if (p.standard == Standard::GraphProp && p.prop > 0) {
    const ImageGraph graph(p.graph, b, count, p.prefix, p.index_prop + b * p.prop, p.prop, leaver);
    return wide ? propagate_scales<double>(p, b, &graph) : propagate_scales<float>(p, b, &graph);
  }
  return wide ? propagate_scales<double>(p, b, nullptr) : propagate_scales<float>(p, b, nullptr);
}

bool take_failure(int failed, Error& error) {
  if (failed) std::snprintf(error.text, sizeof error.text, "%s", kBadGraph);
  return !failed;
}

template <class P>
bool check_selection(const P& p, Error& error) {
  return check_index("index_kept", p.index_kept, p.batch, p.kept, p.prefix, p.tokens, error) &&
         check_index("index_prop", p.index_prop, p.batch, p.prop, p.prefix, p.tokens, error);
}

// Rows per task: enough work to be worth a thread, some tens of kilobytes.
int64_t row_grain(int64_t channels) {
  return channels > 0 ? 1 + 16384 / channels : 1;
}

template <class A>
bool run_propagate(const PropagateParams& p, const Parallel& parallel, Error& error) {
  int failed = 0;
  auto rows = [&](int64_t begin, int64_t end) {
    Transition<A> transition(p);
    Scratch scratch(transition.bytes());
    transition.carve(scratch);
    if (!transition.run(begin, end)) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  };
  if (p.channels > 0) parallel_for(parallel, p.batch * p.rows_out(), row_grain(p.channels), rows);
  auto images = [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::bytes<int32_t>(p.graph.origins));
    int32_t* leaver = scratch.take<int32_t>(p.graph.origins);
    for (int64_t b = begin; b < end; ++b) {
      if (!finish_image(p, b, leaver)) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    }
  };
  if (p.standard == Standard::GraphProp || p.token_scales.data) parallel_for(parallel, p.batch, 16, images);
  return take_failure(failed, error);
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
      add_row(sums + j * width, g, static_cast<A>(value), width, false);
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

template <class A>
void run_dense(const PropagateDenseParams& p, const Parallel& parallel) {
  const int64_t rows_out = p.prefix + p.kept;
  auto body = [&](int64_t begin, int64_t end) {
    Scratch scratch(3 * Scratch::bytes<A>(p.channels));
    A* y_row = scratch.take<A>(p.channels);
    A* source_row = scratch.take<A>(p.channels);
    A* total = scratch.take<A>(p.channels);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t b = at / rows_out, r = at % rows_out;
      const int64_t* index_kept = p.index_kept + b * p.kept;
      const int64_t* index_prop = p.index_prop + b * p.prop;
      const int64_t row = r < p.prefix ? r : index_kept[r - p.prefix];
      const A* y = load_row(p.x, b, row, p.channels, y_row);
      const auto weight_at = [&](int64_t j) {
        A value{};
        const int64_t offset =
            b * p.stride_weight[0] + (row - p.prefix) * p.stride_weight[1] + (j - p.prefix) * p.stride_weight[2];
        return *load_row(p.weight, p.weight_dtype, offset, 1, 1, &value);
      };
      if (r >= p.prefix && p.prop > 0) {
        bool any = false;
        for (int64_t j = 0; j < p.prop; ++j) {
          const A weight = weight_at(index_prop[j]);
          if (weight == 0) continue;
          add_row(total, load_row(p.x, b, index_prop[j], p.channels, source_row), weight, p.channels, !any);
          any = true;
        }
        if (any) {
          const A alpha = static_cast<A>(p.alpha);
          for (int64_t c = 0; c < p.channels; ++c) total[c] = y[c] + alpha * total[c];
          y = total;
        }
      }
      store_row(y, p.x_out, p.x.dtype, at * p.channels, p.channels);
    }
  };
  if (p.channels > 0) parallel_for(parallel, p.batch * rows_out, row_grain(p.channels), body);
}

template <class Element>
void gather_weight(const PropagateDenseParams& p, const Parallel& parallel) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t b = at / p.kept;
      const int64_t* index_kept = p.index_kept + b * p.kept;
      const Element* row = static_cast<const Element*>(p.weight) + b * p.stride_weight[0] +
                           (index_kept[at % p.kept] - p.prefix) * p.stride_weight[1];
      Element* target = static_cast<Element*>(p.weight_out) + at * p.kept;
      for (int64_t k = 0; k < p.kept; ++k) target[k] = row[(index_kept[k] - p.prefix) * p.stride_weight[2]];
    }
  };
  parallel_for(parallel, p.batch * p.kept, row_grain(p.kept), body);
}

template <class S>
void dense_scales(const PropagateDenseParams& p, const Parallel& parallel) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const S* scales = static_cast<const S*>(p.token_scales.data) + b * p.tokens;
      S* target = static_cast<S*>(p.scales_out) + b * (p.prefix + p.kept);
      for (int64_t r = 0; r < p.prefix; ++r) target[r] = scales[r];
      for (int64_t k = 0; k < p.kept; ++k) {
        const int64_t row = p.index_kept[b * p.kept + k];
        S total = 0;
        for (int64_t j = 0; j < p.prop; ++j) {
          const int64_t column = p.index_prop[b * p.prop + j];
          S value{};
          const int64_t offset =
              b * p.stride_weight[0] + (row - p.prefix) * p.stride_weight[1] + (column - p.prefix) * p.stride_weight[2];
          const S weight = *load_row(p.weight, p.weight_dtype, offset, 1, 1, &value);
          if (weight != 0) total += weight * scales[column];
        }
        target[p.prefix + k] = p.prop > 0 ? scales[row] + static_cast<S>(p.alpha) * total : scales[row];
      }
    }
  };
  parallel_for(parallel, p.batch, 4, body);
}

}  // namespace

bool propagate(const PropagateParams& p, const Parallel& parallel, Error& error) {
  if (!check_selection(p, error)) return false;
  if (p.standard == Standard::GraphProp && !check_token(p.graph, p.batch, p.tokens - p.prefix, error)) return false;
  return p.out_dtype == DType::Float64 ? run_propagate<double>(p, parallel, error)
                                       : run_propagate<float>(p, parallel, error);
}

bool propagate_backward(const PropagateBackwardParams& p, const Parallel& parallel, Error& error) {
  if (!check_selection(p, error)) return false;
  if (p.standard == Standard::GraphProp && !check_token(p.graph, p.batch, p.tokens - p.prefix, error)) return false;
  return p.grad.dtype == DType::Float64 ? run_backward<double>(p, parallel, error)
                                        : run_backward<float>(p, parallel, error);
}

bool propagate_dense(const PropagateDenseParams& p, const Parallel& parallel, Error& error) {
  if (!check_selection(p, error)) return false;
  if (p.x.dtype == DType::Float64) {
    run_dense<double>(p, parallel);
  } else {
    run_dense<float>(p, parallel);
  }
  if (p.kept > 0) {
    const int64_t size = size_of(p.weight_dtype);
    if (size == 8) {
      gather_weight<uint64_t>(p, parallel);
    } else if (size == 4) {
      gather_weight<uint32_t>(p, parallel);
    } else {
      gather_weight<uint16_t>(p, parallel);
    }
  }
  if (p.token_scales.data) {
    if (p.token_scales.dtype == DType::Float64) {
      dense_scales<double>(p, parallel);
    } else {
      dense_scales<float>(p, parallel);
    }
  }
  return true;
}

}  // namespace GTP_ISA
}  // namespace gtp
