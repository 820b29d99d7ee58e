// propagate, and the block transition residual + propagate + norm in one pass.
//
// Bound by memory: x (and branch) are read once, x_out (and normed) written once; 2 * C FLOPs per edge that counts. A
// task is a range of output rows; every row is computed whole by one thread in one order: its edges are walked once,
// then a sweep reads x and branch, adds the rows that the edges bring and writes x_out, a second one takes the
// variance, and a third writes the norm, while the row is in the first cache and the next one on its way there. The y
// of a token that leaves is computed when the first edge of the task asks for it.

#include "dtype.h"
#include "image_graph.h"
#include "kernels.h"
#include "scratch.h"
#include "vec.h"

namespace gtp {
namespace GTP_ISA {
namespace {

enum class Branch { None, Plain, Scaled };

// T: the element type of x_out and normed.
template <class T, Branch kBranch>
class Step {
 public:
  explicit Step(const PropagateParams& params)
      : p(params),
        channels(p.channels),
        rows_out(p.rows_out()),
        uses_graph(p.standard == Standard::GraphProp && p.prop > 0),
        merges(p.standard == Standard::Merge && p.prop > 0),
        x_out(static_cast<T*>(p.x_out)),
        normed(static_cast<T*>(p.normed)) {}

  size_t bytes() const {
    return 2 * Scratch::bytes<T>(channels) + 4 * Scratch::bytes<A>(channels) + Scratch::bytes<A>(leavers() * channels) +
           Scratch::bytes<const A*>(leavers()) + Scratch::bytes<int32_t>(p.graph.origins) +
           Scratch::bytes<int64_t>(merges ? p.kept : 0) + Scratch::bytes<int64_t>(merges ? p.prop : 0);
  }

  void carve(Scratch& scratch) {
    x_row = scratch.take<T>(channels);
    branch_row = scratch.take<T>(channels);
    layer_scale = vector(p.layer_scale, scratch.take<A>(channels), A(1));
    weight = vector(p.norm_weight, scratch.take<A>(channels), A(1));
    bias = vector(p.norm_bias, scratch.take<A>(channels), A(0));
    total = scratch.take<A>(channels);
    leaving = scratch.take<A>(leavers() * channels);
    leaver_row = scratch.take<const A*>(leavers());
    leaver = scratch.take<int32_t>(p.graph.origins);
    first_source = scratch.take<int64_t>(merges ? p.kept : 0);
    next_source = scratch.take<int64_t>(merges ? p.prop : 0);
  }

  // Rows begin to end of all images' output rows; false for a bad CSR.
  bool run(int64_t begin, int64_t end) {
    bool ok = true;
    for (int64_t at = begin; at < end;) {
      image = at / rows_out;
      index_kept = p.index_kept + image * p.kept;
      index_prop = p.index_prop + image * p.prop;
      const int64_t first = at - image * rows_out;
      const int64_t last = end - image * rows_out < rows_out ? end - image * rows_out : rows_out;
      if (uses_graph) {
        const ImageGraph graph(p.graph, image, p.tokens - p.prefix, p.prefix, index_prop, p.prop, leaver);
        for (int64_t j = 0; j < p.prop; ++j) leaver_row[j] = nullptr;
        for (int64_t r = first; r < last; ++r) ok &= one_row(r, &graph);
      } else if (merges) {
        list_sources();
        for (int64_t r = first; r < last; ++r) ok &= one_row(r, nullptr);
      } else {
        for (int64_t r = first; r < last; ++r) ok &= one_row(r, nullptr);
      }
      at += last - first;
    }
    return ok;
  }

 private:
  using A = Wide<T>;
  using V = typename Vec<A>::V;

  struct Row {
    const T *x, *branch;
    const A* layer_scale;

    template <class P>
    GTP_INLINE_MEMBER V y(int64_t c, P part) const {
      V y = load(x + c, part);
      if constexpr (kBranch == Branch::Plain) y += load(branch + c, part);
      if constexpr (kBranch == Branch::Scaled) y += load(layer_scale + c, part) * load(branch + c, part);
      return y;
    }
  };

  // The edges of a row: alpha * value, and the y that it multiplies.
  struct Edges {
    static constexpr int kMost = 16;
    int count = 0;
    A value[kMost];
    const A* row[kMost];
  };

  int64_t leavers() const {
    return uses_graph || merges ? p.prop : 0;
  }

  // The leaving rows that go to each kept one, in rising order.
  void list_sources() {
    for (int64_t k = 0; k < p.kept; ++k) first_source[k] = -1;
    for (int64_t j = 0; j < p.prop; ++j) leaver_row[j] = nullptr;
    for (int64_t j = p.prop - 1; j >= 0; --j) {
      const int64_t k = p.target[image * p.prop + j];
      if (k < 0) continue;
      next_source[j] = first_source[k];
      first_source[k] = j;
    }
  }

  float share_of(int64_t n) const {
    return p.share[image * (p.tokens - p.prefix) + n - p.prefix];
  }

  const A* vector(const Vector& v, A* buffer, A otherwise) const {
    if (v.data) return load_row(v, channels, buffer);
    for (int64_t c = 0; c < channels; ++c) buffer[c] = otherwise;
    return buffer;
  }

  // Row n of x or of the branch as T, the promoted type of the two: a half type only where both have it.
  const T* row_as(const Rows& rows, int64_t n, T* buffer) const {
    if constexpr (sizeof(T) == sizeof(A)) {
      return load_row(rows, image, n, channels, buffer);
    } else {
      return static_cast<const T*>(rows.data) + image * rows.stride_b + n * rows.stride_n;
    }
  }

  Row row_of(int64_t n) const {
    return {row_as(p.x, n, x_row), kBranch == Branch::None ? nullptr : row_as(p.branch, n, branch_row), layer_scale};
  }

  void add_edge(Edges& edges, int64_t j, A value) {
    if (edges.count == Edges::kMost) {
      A* const target = total;
      sweep<A>(channels, [&](int64_t c, auto part, int) {
        V sum = edges.value[0] * load(edges.row[0] + c, part);
        for (int e = 1; e < edges.count; ++e) sum += edges.value[e] * load(edges.row[e] + c, part);
        store_rounded(target + c, sum, part);
      });
      edges.count = 1;
      edges.value[0] = A(1);
      edges.row[0] = target;
    }
    if (!leaver_row[j]) {
      const Row row = row_of(index_prop[j]);
      A* const target = leaving + j * channels;
      sweep<A>(channels, [&](int64_t c, auto part, int) { store_rounded(target + c, row.y(c, part), part); });
      leaver_row[j] = target;
    }
    edges.value[edges.count] = value;
    edges.row[edges.count++] = leaver_row[j];
  }

  // target = value(c, part), rounded; the sum of what was written.
  template <class F>
  GTP_INLINE_MEMBER A write(T* target, F value) {
    Sums<A> sums;
    sweep<A>(channels,
             [&](int64_t c, auto part, int i) { sums.lanes[i] += store_rounded(target + c, value(c, part), part); });
    return sums.total();
  }

  // x_out of a kept or prefix row; the sum of what was written.
  GTP_INLINE_MEMBER A write_row(const Row& row, const Edges& edges, A own, T* target) {
    if (merges && edges.count > 0) {
      return write(target, [&](int64_t c, auto part) {
        V y = own * row.y(c, part);
        for (int e = 0; e < edges.count; ++e) y += edges.value[e] * load(edges.row[e] + c, part);
        return y;
      });
    }
    if (edges.count > 0) {
      return write(target, [&](int64_t c, auto part) {
        V y = row.y(c, part);
        for (int e = 0; e < edges.count; ++e) y += edges.value[e] * load(edges.row[e] + c, part);
        return y;
      });
    }
    if constexpr (kBranch != Branch::None) {
      return write(target, [&](int64_t c, auto part) { return row.y(c, part); });
    }
    if (channels > 0) std::memcpy(target, row.x, static_cast<size_t>(channels) * sizeof(T));
    Sums<A> sums;
    if (p.norm == Norm::Layer) {
      sweep<A>(channels, [&](int64_t c, auto part, int i) { sums.lanes[i] += load(target + c, part); });
    }
    return sums.total();
  }

  // The norm of one row of x_out from its sum. Row n of x and the branch, which comes next, is fetched meanwhile: rows
  // in an order of importance are no stream that the machine foresees.
  GTP_INLINE_MEMBER void write_norm(const T* row, A sum, T* target, int64_t n) {
    const A share = A(1) / static_cast<A>(channels);
    const A mean = p.norm == Norm::Layer ? sum * share : A(0);
    Sums<A> squares;
    sweep<A>(channels, [&](int64_t c, auto part, int i) {
      const V d = load(row + c, part) - splat(mean, part);
      squares.lanes[i] += d * d;
    });
    const A scale = A(1) / root(squares.total() * share + static_cast<A>(p.norm_eps));
    // Local copies: the compiler would load the members again after every store.
    const A *w = weight, *shift = bias;
    const char* next[2] = {address(p.x, n), address(kBranch == Branch::None ? p.x : p.branch, n)};
    sweep<A>(channels, [&](int64_t c, auto part, int) {
      __builtin_prefetch(next[0] + c * static_cast<int64_t>(sizeof(T)));
      __builtin_prefetch(next[1] + c * static_cast<int64_t>(sizeof(T)));
      const V v = (load(row + c, part) - mean) * scale * load(w + c, part) + load(shift + c, part);
      store_rounded(target + c, v, part);
    });
  }

  const char* address(const Rows& rows, int64_t n) const {
    return static_cast<const char*>(rows.data) + (image * rows.stride_b + n * rows.stride_n) * size_of(rows.dtype);
  }

  int64_t source_row(int64_t r) const {
    return r < p.prefix ? r : index_kept[r - p.prefix];
  }

  double scale_of(int64_t n) const {
    return load_scalar(p.token_scales, image * p.tokens + n);
  }

  bool one_row(int64_t r, const ImageGraph* graph) {
    const int64_t at = image * rows_out + r;
    T* const target = x_out + at * channels;
    const bool scaled = p.token_scales.data;
    double scale = 0;
    A sum;
    if (r == p.prefix + p.kept) {
      sum = write_mean(target);
      for (int64_t j = 0; scaled && j < p.prop; ++j) scale += scale_of(index_prop[j]);
    } else {
      const int64_t n = source_row(r);
      Edges edges;
      A own = A(1);
      if (merges && r >= p.prefix) {
        own = static_cast<A>(share_of(n));
        for (int64_t j = first_source[r - p.prefix]; j >= 0; j = next_source[j]) {
          add_edge(edges, j, static_cast<A>(share_of(index_prop[j])));
        }
      }
      if (r >= p.prefix && p.standard == Standard::GraphProp) {
        double moved = 0;
        const A alpha = static_cast<A>(p.alpha);
        if (graph && !graph->walk(n, [&](int64_t j, float value) {
              add_edge(edges, j, alpha * static_cast<A>(value));
              if (scaled) moved += static_cast<double>(value) * scale_of(index_prop[j]);
            })) {
          return false;
        }
        if (edges.count > 0) scale = p.alpha * moved;
        const int64_t k = image * p.kept + r - p.prefix;
        p.token_out[k] = p.graph.token[image * (p.tokens - p.prefix) + n - p.prefix];
      }
      if (scaled) scale = edges.count > 0 ? scale_of(n) + scale : scale_of(n);
      sum = write_row(row_of(n), edges, own, target);
    }
    if (scaled) store_scalar(scale, p.scales_out, p.token_scales.dtype, at);
    if (p.norm != Norm::None) {
      write_norm(target, sum, normed + at * channels, r + 1 < p.prefix + p.kept ? source_row(r + 1) : 0);
    }
    return true;
  }

  A write_mean(T* target) {
    A* const y = total;
    for (int64_t j = 0; j < p.prop; ++j) {
      const Row row = row_of(index_prop[j]);
      sweep<A>(channels, [&](int64_t c, auto part, int) {
        store_rounded(y + c, j > 0 ? load(y + c, part) + row.y(c, part) : row.y(c, part), part);
      });
    }
    const A n = static_cast<A>(p.prop);
    return write(target, [&](int64_t c, auto part) { return load(y + c, part) / n; });
  }

  const PropagateParams& p;
  const int64_t channels, rows_out;
  const bool uses_graph, merges;
  T *const x_out, *const normed;
  const A *layer_scale, *weight, *bias;
  T *x_row, *branch_row;
  A *total, *leaving;
  const A** leaver_row;  // [P]: y of a row that leaves, or null
  int32_t* leaver;
  int64_t *first_source, *next_source;  // Merge: [K] and [P], lists of leaving rows that end with -1
  int64_t image;
  const int64_t *index_kept, *index_prop;
};

template <class T, Branch kBranch>
bool run_step(const PropagateParams& p, const Parallel& parallel, Error& error) {
  int failed = 0;
  auto rows = [&](int64_t begin, int64_t end) {
    Step<T, kBranch> step(p);
    Scratch scratch(step.bytes());
    step.carve(scratch);
    if (!step.run(begin, end)) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  };
  // Rows per task: enough work to be worth a thread, some tens of kilobytes.
  const int64_t grain = 1 + 16384 / (p.channels > 0 ? p.channels : 1);
  parallel_for(parallel, p.batch * p.rows_out(), grain, rows);
  return take_failure(failed, error);
}

template <class T>
bool run_propagate(const PropagateParams& p, const Parallel& parallel, Error& error) {
  if (!p.branch.data) return run_step<T, Branch::None>(p, parallel, error);
  if (!p.layer_scale.data) return run_step<T, Branch::Plain>(p, parallel, error);
  return run_step<T, Branch::Scaled>(p, parallel, error);
}

}  // namespace

bool propagate(const PropagateParams& p, const Parallel& parallel, Error& error) {
  if (!check_selection(p, error)) return false;
  if (p.standard == Standard::GraphProp && !check_token(p.graph, p.batch, p.tokens - p.prefix, error)) return false;
  if (p.standard == Standard::Merge && !check_index("target", p.target, p.batch, p.prop, -1, p.kept, error)) {
    return false;
  }
  switch (p.out_dtype) {
    case DType::Float32:
      return run_propagate<float>(p, parallel, error);
    case DType::Float64:
      return run_propagate<double>(p, parallel, error);
    case DType::BFloat16:
      return run_propagate<BFloat16>(p, parallel, error);
    case DType::Float16:
      return run_propagate<Float16>(p, parallel, error);
  }
  return false;
}

}  // namespace GTP_ISA
}  // namespace gtp
