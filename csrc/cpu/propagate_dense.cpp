// propagate with a dense weight, and the part of the weight that stays.

#include "dtype.h"
#include "image_graph.h"
#include "kernels.h"
#include "scratch.h"
#include "vec.h"

namespace gtp {
namespace GTP_ISA {
namespace {

// target = value * source on the first edge, target += value * source on the others.
template <class A>
void add_row(A* target, const A* source, A value, int64_t count, bool first) {
  if (first) {
    for (int64_t c = 0; c < count; ++c) target[c] = value * source[c];
  } else {
    for (int64_t c = 0; c < count; ++c) target[c] += value * source[c];
  }
}

// Rows per task: enough work to be worth a thread, some tens of kilobytes.
int64_t row_grain(int64_t channels) {
  return channels > 0 ? 1 + 16384 / channels : 1;
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
