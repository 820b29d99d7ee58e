// live_graph: both directions of every edge of a CSR, once, rows sorted by column.

#include <algorithm>
#include <cstdio>
#include <vector>

#include "kernels.h"

namespace gtp {

namespace {

// One image; false for a bad CSR.
bool both_directions(const int32_t* indptr, const int32_t* indices, int64_t count, int64_t capacity,
                     int32_t* live_indptr, int32_t* live_indices) {
  // Edges by column: in the order of their rows, so that both lists of a token ascend.
  std::vector<int32_t> start(static_cast<size_t>(count) + 1), source;
  for (int64_t i = 0; i < count; ++i) {
    if (indptr[i] < 0 || indptr[i + 1] < indptr[i] || indptr[i + 1] > capacity) return false;
    for (int32_t e = indptr[i]; e < indptr[i + 1]; ++e) {
      if (indices[e] < 0 || indices[e] >= count) return false;
      ++start[static_cast<size_t>(indices[e]) + 1];
    }
  }
  for (int64_t i = 0; i < count; ++i) start[i + 1] += start[i];
  source.resize(static_cast<size_t>(start[count]));
  std::vector<int32_t> at(start.begin(), start.end());
  for (int64_t i = 0; i < count; ++i) {
    for (int32_t e = indptr[i]; e < indptr[i + 1]; ++e) source[at[indices[e]]++] = static_cast<int32_t>(i);
  }
  int32_t filled = 0;
  live_indptr[0] = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t out = indptr[i], in = start[i];
    const int32_t first = filled;
    while (out < indptr[i + 1] || in < start[i + 1]) {
      const bool from_out = in == start[i + 1] || (out < indptr[i + 1] && indices[out] <= source[in]);
      const int32_t column = from_out ? indices[out++] : source[in++];
      if (filled == first || live_indices[filled - 1] != column) live_indices[filled++] = column;
    }
    live_indptr[i + 1] = filled;
  }
  std::fill_n(live_indices + filled, 2 * capacity - filled, 0);
  return true;
}

}  // namespace

bool live_graph(const LiveGraphParams& p, const Parallel& parallel, Error& error) {
  int failed = 0;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      if (!both_directions(p.indptr + b * (p.count + 1), p.indices + b * p.capacity, p.count, p.capacity,
                           p.live_indptr + b * (p.count + 1), p.live_indices + b * 2 * p.capacity)) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      }
    }
  };
  parallel_for(parallel, p.batch, 1, body);
  if (failed) {
    std::snprintf(error.text, sizeof error.text,
                  "indptr and indices: each row must be a range within [0, E], of columns in [0, n)");
  }
  return !failed;
}

}  // namespace gtp
