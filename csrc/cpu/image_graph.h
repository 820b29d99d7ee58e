// What the kernels of propagate share: the checks of indices and token maps, and the edges of one image.
#pragma once

#include <cstdio>
#include <cstring>

#include "kernels.h"
#include "vec.h"

namespace gtp {
namespace GTP_ISA {

static inline bool check_index(const char* name, const int64_t* index, int64_t batch, int64_t count, int64_t low,
                               int64_t high, Error& error) {
  bool bad = false;  // no branch, so that the loop is one of vectors
  for (int64_t i = 0; i < batch * count; ++i) bad |= index[i] < low || index[i] >= high;
  if (!bad) return true;
  int64_t i = 0;
  while (index[i] >= low && index[i] < high) ++i;
  std::snprintf(error.text, sizeof error.text, "%s[%lld, %lld] is %lld; it must be in [%lld, %lld)", name,
                static_cast<long long>(i / count), static_cast<long long>(i % count), static_cast<long long>(index[i]),
                static_cast<long long>(low), static_cast<long long>(high));
  return false;
}

template <class P>
static inline bool check_selection(const P& p, Error& error) {
  return check_index("index_kept", p.index_kept, p.batch, p.kept, p.prefix, p.tokens, error) &&
         check_index("index_prop", p.index_prop, p.batch, p.prop, p.prefix, p.tokens, error);
}

static inline bool check_token(const GraphView& graph, int64_t batch, int64_t count, Error& error) {
  bool bad = false;
  for (int64_t i = 0; i < batch * count; ++i) bad |= graph.token[i] < 0 || graph.token[i] >= graph.origins;
  if (!bad) return true;
  int64_t i = 0;
  while (graph.token[i] >= 0 && graph.token[i] < graph.origins) ++i;
  std::snprintf(error.text, sizeof error.text, "token[%lld, %lld] is %d; it must be in [0, %lld)",
                static_cast<long long>(i / count), static_cast<long long>(i % count), graph.token[i],
                static_cast<long long>(graph.origins));
  return false;
}

// false and the text where a task met a bad CSR.
static inline bool take_failure(int failed, Error& error) {
  if (failed) {
    std::snprintf(
        error.text, sizeof error.text,
        "indptr and indices: each row must be a range indptr[t] <= indptr[t + 1] within [0, E], of columns in "
        "[0, n0)");
  }
  return !failed;
}

// The graph of one image, and which of its original tokens leave.
class ImageGraph {
 public:
  // `leaver`: scratch, [origins].
  ImageGraph(const GraphView& graph, int64_t b, int64_t count, int64_t prefix, const int64_t* index_prop, int64_t prop,
             int32_t* leaver)
      : indptr_(graph.indptr + b * (graph.origins + 1)),
        indices_(graph.indices + b * graph.capacity),
        token_(graph.token + b * count),
        values_(graph.values + b * graph.capacity),
        origins_(graph.origins),
        capacity_(graph.capacity),
        prefix_(prefix),
        leaver_(leaver) {
    std::memset(leaver, 0xff, static_cast<size_t>(origins_) * sizeof(int32_t));
    for (int64_t j = 0; j < prop; ++j) leaver[token(index_prop[j])] = static_cast<int32_t>(j);
    // Rows are walked in the order of index_kept, which the machine does not foresee.
    for (int64_t e = indptr_[0] > 0 ? indptr_[0] : 0; e < indptr_[origins_] && e < capacity_; e += 16) {
      __builtin_prefetch(indices_ + e);
    }
    if (!few()) return;
    for (uint32_t& word : set_) word = 0;
    for (int64_t j = 0; j < prop; ++j) {
      const int32_t t = token(index_prop[j]);
      set_[t / 32] |= 1u << t % 32;
    }
  }

  int32_t token(int64_t row) const {
    return token_[row - prefix_];
  }

  // edge(j, value) for every edge from the token behind row `row` to a token that leaves, the j-th of index_prop; false
  // for a bad CSR. Few edges count, and none predictably: which do is found without a branch, many edges at a time.
  template <class Edge>
  GTP_INLINE_MEMBER bool walk(int64_t row, Edge edge) const {
    const int32_t t = token(row);
    const int64_t begin = indptr_[t], end = indptr_[t + 1];
    if (begin < 0 || end < begin || end > capacity_) return false;
    const int64_t step = few() ? kSetLanes : 64;
    for (int64_t e = begin; e < end; e += step) {
      bool outside = false;
      uint64_t counts = few() ? members(set_, indices_ + e, end - e, origins_, outside) : look_up(e, end, outside);
      if (outside) return false;
      for (; counts; counts &= counts - 1) {
        const int64_t at = e + __builtin_ctzll(counts);
        edge(leaver_[indices_[at]], values_[at]);
      }
    }
    return true;
  }

 private:
  bool few() const {
    return origins_ <= 32 * kSetWords;
  }

  uint64_t look_up(int64_t begin, int64_t end, bool& outside) const {
    const int64_t count = end - begin < 64 ? end - begin : 64;
    uint64_t counts = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t column = static_cast<uint32_t>(indices_[begin + i]);
      const bool inside = column < static_cast<uint64_t>(origins_);
      outside |= !inside;
      counts |= static_cast<uint64_t>(leaver_[inside ? column : 0] >= 0) << i;
    }
    return counts;
  }

  const int32_t *indptr_, *indices_, *token_;
  const float* values_;
  const int64_t origins_, capacity_, prefix_;
  const int32_t* leaver_;             // [origins]: the position in index_prop, or -1
  uint32_t set_[kSetWords + 1] = {};  // the tokens that leave, where they are few enough for members()
};

}  // namespace GTP_ISA
}  // namespace gtp
