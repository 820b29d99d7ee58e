// live_select: which rows leave, and where each goes, by the cosine of the keys of neighbours. One image is a task.
//
// The edges are walked twice. The first time every pair of original neighbours (each once, from its lower end) says how
// similar the two rows are that carry them now, which leaves the best edge of every row. The second time, in the order
// of the scores, a row that leaves looks through the neighbours of all that it carries: P rows do, so their cosines are
// computed again instead of kept.

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "dtype.h"
#include "image_graph.h"
#include "kernels.h"
#include "scratch.h"
#include "vec.h"

namespace gtp {
namespace GTP_ISA {
namespace {

constexpr double kLeastImportance = 1e-6;  // of the mean
constexpr int64_t kRowsAhead = 2;

template <class T>
class LiveSelect {
 public:
  static constexpr int W = Vec<T>::W;
  using V = typename Vec<T>::V;

  explicit LiveSelect(const LiveSelectParams& params)
      : p(params), rows(p.tokens - p.prefix), kept(rows - p.prop), width((p.head_size + W - 1) / W * W) {}

  size_t bytes() const {
    return Scratch::bytes<T>(rows * width) + 2 * Scratch::bytes<T>(rows) + 4 * Scratch::bytes<int32_t>(rows) +
           Scratch::bytes<int32_t>(p.origins) + Scratch::bytes<double>(rows);
  }

  void carve(Scratch& scratch) {
    unit = scratch.take<T>(rows * width);
    best = scratch.take<T>(rows);
    score = scratch.take<T>(rows);
    order = scratch.take<int32_t>(rows);
    into = scratch.take<int32_t>(rows);
    place = scratch.take<int32_t>(rows);
    first = scratch.take<int32_t>(rows);
    next = scratch.take<int32_t>(p.origins);
    total = scratch.take<double>(rows);
  }

  // false for a bad CSR or map.
  bool run(int64_t b) {
    image = b;
    indptr = p.indptr + b * (p.origins + 1);
    indices = p.indices + b * p.capacity;
    rep = p.rep + b * p.origins;
    if (!check()) return false;
    make_unit_keys();
    find_best();
    make_scores();
    walk();
    write();
    return true;
  }

 private:
  enum : int32_t { kStays = -2, kTarget = -3, kDropped = -1 };

  bool check() const {
    bool ok = true;
    for (int64_t u = 0; u < p.origins; ++u) {
      ok &= rep[u] >= -1 && rep[u] < rows;
      ok &= indptr[u] >= 0 && indptr[u + 1] >= indptr[u] && indptr[u + 1] <= p.capacity;
    }
    for (int64_t e = 0; ok && p.origins > 0 && e < indptr[p.origins]; ++e) {
      ok &= indices[e] >= 0 && indices[e] < p.origins;
    }
    return ok;
  }

  // The mean of the keys over heads, at unit length; what lies beyond d is zero.
  void make_unit_keys() {
    if constexpr (sizeof(T) == sizeof(double)) {
      return add_heads<double>();
    } else {
      switch (p.dtype) {
        case DType::BFloat16:
          return add_heads<BFloat16>();
        case DType::Float16:
          return add_heads<Float16>();
        default:
          return add_heads<float>();
      }
    }
  }

  template <class E>
  void add_heads() {
    const T heads = static_cast<T>(p.heads);
    const int64_t whole = p.stride_k[3] == 1 ? p.head_size / W * W : 0;
    const E* keys = static_cast<const E*>(p.k) + image * p.stride_k[0] + p.prefix * p.stride_k[2];
    for (int64_t i = 0; i < rows; ++i, keys += p.stride_k[2]) {
      if (i + kRowsAhead < rows) fetch(keys + kRowsAhead * p.stride_k[2]);
      T* target = unit + i * width;
      V squares{};
      for (int64_t c = 0; c < width; c += W) {
        V sum{};
        if (c < whole) {
          for (int64_t h = 0; h < p.heads; ++h) sum += load(keys + h * p.stride_k[1] + c);
        } else {
          for (int64_t h = 0; h < p.heads; ++h) sum += rest(keys + h * p.stride_k[1], c);
        }
        const V mean = sum / splat(heads);
        store(target + c, mean);
        squares += mean * mean;
      }
      const T norm = root(reduce_sum<T>(squares));
      const V divisor = splat(norm == T(0) ? T(1) : norm);
      for (int64_t c = 0; c < width; c += W) store(target + c, load(target + c) / divisor);
    }
  }

  // A row of all heads, when it is contiguous; kilobytes from the one before it.
  template <class E>
  GTP_INLINE_MEMBER void fetch(const E* keys) const {
    if (p.stride_k[3] != 1) return;
    for (int64_t h = 0; h < p.heads; ++h) {
      const char* row = reinterpret_cast<const char*>(keys + h * p.stride_k[1]);
      for (int64_t c = 0; c < p.head_size * static_cast<int64_t>(sizeof(E)); c += 64) __builtin_prefetch(row + c);
    }
  }

  // The vector at c of a key, one element after the other.
  template <class E>
  V rest(const E* key, int64_t c) const {
    E lanes[W] = {};
    for (int64_t j = c; j < p.head_size && j < c + W; ++j) lanes[j - c] = key[j * p.stride_k[3]];
    return load(lanes);
  }

  // The cosine of two rows, the same to the bit either way round; -1 for what is no number.
  GTP_INLINE_MEMBER T cosine(int64_t a, int64_t b) const {
    V sum{};
    for (int64_t c = 0; c < width; c += W) sum += load(unit + a * width + c) * load(unit + b * width + c);
    return number(reduce_sum<T>(sum));
  }

  static T number(T x) {
    return x - x == T(0) ? x : T(-1);
  }

  // Pairs of rows, four at a time, so that no product waits for the one before it.
  struct Pairs {
    static constexpr int kCount = 4;
    int count = 0;
    int32_t a[kCount], b[kCount];
  };

  GTP_INLINE_MEMBER void add_pair(Pairs& pairs, int32_t a, int32_t b) {
    pairs.a[pairs.count] = a;
    pairs.b[pairs.count] = b;
    if (++pairs.count < Pairs::kCount) return;
    pairs.count = 0;
    V sums[Pairs::kCount] = {};
    for (int64_t c = 0; c < width; c += W) {
      for (int j = 0; j < Pairs::kCount; ++j) {
        sums[j] += load(unit + pairs.a[j] * width + c) * load(unit + pairs.b[j] * width + c);
      }
    }
    T cosines[Pairs::kCount];
    for (int j = 0; j < Pairs::kCount; ++j) cosines[j] = reduce_sum<T>(sums[j]);
    for (int j = 0; j < Pairs::kCount; ++j) see(pairs.a[j], pairs.b[j], number(cosines[j]));
  }

  GTP_INLINE_MEMBER void see(int32_t a, int32_t b, T cosine) {
    best[a] = cosine > best[a] ? cosine : best[a];
    best[b] = cosine > best[b] ? cosine : best[b];
  }

  // best: -inf for a row without edges. first and next: the original tokens that each row carries.
  void find_best() {
    for (int64_t i = 0; i < rows; ++i) {
      best[i] = -Vec<T>::inf;
      first[i] = -1;
    }
    Pairs pairs;
    for (int64_t u = p.origins - 1; u >= 0; --u) {
      const int32_t a = rep[u];
      if (a < 0) continue;
      next[u] = first[a];
      first[a] = static_cast<int32_t>(u);
      for (int32_t e = indptr[u + 1] - 1; e >= indptr[u] && indices[e] > u; --e) {
        const int32_t b = rep[indices[e]];
        if (b >= 0 && a != b) add_pair(pairs, a, b);
      }
    }
    for (int j = 0; j < pairs.count; ++j) see(pairs.a[j], pairs.b[j], cosine(pairs.a[j], pairs.b[j]));
  }

  void make_scores() {
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) sum += importance(i);
    const T mean = static_cast<T>(sum / static_cast<double>(rows));
    for (int64_t i = 0; i < rows; ++i) {
      T relative = static_cast<T>(importance(i)) / mean;
      if (!(relative > static_cast<T>(kLeastImportance))) relative = static_cast<T>(kLeastImportance);
      const T power = std::pow(relative, static_cast<T>(p.gamma));
      const T found = best[i] == -Vec<T>::inf ? Vec<T>::inf : (T(1) - best[i]) * power;
      score[i] = std::isnan(found) ? Vec<T>::inf : found;
      order[i] = static_cast<int32_t>(i);
    }
    std::sort(order, order + rows,
              [this](int32_t a, int32_t b) { return score[a] < score[b] || (score[a] == score[b] && a > b); });
  }

  double importance(int64_t i) const {
    return load_scalar(p.importance, image * rows + i);
  }

  // The most similar neighbour of `row` that may take it, or -1.
  int32_t choose(int32_t row, bool full) const {
    int32_t found = -1;
    T most = 0;
    for (int32_t u = first[row]; u >= 0; u = next[u]) {
      for (int32_t e = indptr[u]; e < indptr[u + 1]; ++e) {
        const int32_t other = rep[indices[e]];
        if (other < 0 || other == row || other == found) continue;
        if (into[other] != kTarget && (full || into[other] != kStays)) continue;
        const T w = cosine(row, other);
        if (found < 0 || w > most || (w == most && other < found)) {
          found = other;
          most = w;
        }
      }
    }
    return found;
  }

  void walk() {
    for (int64_t i = 0; i < rows; ++i) into[i] = kStays;
    int64_t left = 0, targets = 0;
    for (int64_t i = 0; i < rows && left < p.prop; ++i) {
      const int32_t row = order[i];
      if (into[row] == kTarget) continue;
      const int32_t other = choose(row, targets == kept);
      if (other < 0) continue;
      targets += into[other] != kTarget;
      into[other] = kTarget;
      into[row] = other;
      ++left;
    }
    for (int64_t i = 0; i < rows && left < p.prop; ++i) {
      if (into[order[i]] != kStays) continue;
      into[order[i]] = kDropped;
      ++left;
    }
  }

  void write() {
    int64_t* index_kept = p.index_kept + image * kept;
    int64_t* index_prop = p.index_prop + image * p.prop;
    int64_t* target = p.target + image * p.prop;
    const float* sizes = p.sizes + image * p.tokens;
    int64_t k = 0, j = 0;
    for (int64_t i = 0; i < rows; ++i) {
      total[i] = sizes[p.prefix + i];
      if (into[i] == kStays || into[i] == kTarget) {
        place[i] = static_cast<int32_t>(k);
        index_kept[k++] = i + p.prefix;
      } else {
        place[i] = -1;
        index_prop[j++] = i + p.prefix;
      }
    }
    for (j = 0; j < p.prop; ++j) {
      const int64_t i = index_prop[j] - p.prefix;
      target[j] = into[i] < 0 ? -1 : place[into[i]];
      if (into[i] >= 0) total[into[i]] += sizes[p.prefix + i];
    }
    float* share = p.share + image * rows;
    float* sizes_out = p.sizes_out + image * (p.prefix + kept);
    for (int64_t r = 0; r < p.prefix; ++r) sizes_out[r] = sizes[r];
    for (int64_t i = 0; i < rows; ++i) {
      const bool gone = place[i] < 0;
      share[i] = gone && into[i] < 0 ? 0.0f : static_cast<float>(sizes[p.prefix + i] / total[gone ? into[i] : i]);
      if (!gone) sizes_out[p.prefix + place[i]] = static_cast<float>(total[i]);
    }
    int32_t* rep_out = p.rep_out + image * p.origins;
    for (int64_t u = 0; u < p.origins; ++u) {
      const int32_t i = rep[u];
      rep_out[u] = i < 0 ? -1 : place[i] >= 0 ? place[i] : into[i] < 0 ? -1 : place[into[i]];
    }
  }

  const LiveSelectParams& p;
  const int64_t rows, kept, width;
  int64_t image = 0;
  const int32_t *indptr, *indices, *rep;
  T *unit, *best, *score;
  int32_t *order, *into, *place, *first, *next;
  double* total;
};

template <class T>
bool run_live(const LiveSelectParams& p, const Parallel& parallel, Error& error) {
  int failed = 0;
  auto body = [&](int64_t begin, int64_t end) {
    LiveSelect<T> select(p);
    Scratch scratch(select.bytes());
    select.carve(scratch);
    for (int64_t b = begin; b < end; ++b) {
      if (!select.run(b)) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    }
  };
  parallel_for(parallel, p.batch, 1, body);
  if (failed) {
    std::snprintf(
        error.text, sizeof error.text,
        "indptr, indices and rep: each row must be a range within [0, E], of columns in [0, n0), and rep must "
        "be in [-1, n)");
  }
  return !failed;
}

}  // namespace

bool live_select(const LiveSelectParams& p, const Parallel& parallel, Error& error) {
  return p.dtype == DType::Float64 ? run_live<double>(p, parallel, error) : run_live<float>(p, parallel, error);
}

}  // namespace GTP_ISA
}  // namespace gtp
