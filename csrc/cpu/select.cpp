// token_importance and select_tokens: O(B H N) and O(B n), one task per image, no vectors worth a build per
// instruction set.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace gtp {

int64_t threshold_rank(int64_t tokens, double sparsity, bool paper) {
  const double n = static_cast<double>(tokens);
  const int64_t total = tokens * tokens;
  if (!(sparsity < 1.0) || total == 0) return 0;
  if (paper) {
    const int64_t keep = static_cast<int64_t>(std::ceil(sparsity * n * n));
    if (keep >= total) return 0;
    return keep < 1 ? total : total - keep + 1;
  }
  const int64_t rank = static_cast<int64_t>(static_cast<double>(total) * (1.0 - sparsity));
  return rank < 0 ? 0 : rank > total ? total : rank;
}

namespace {

// A thread gets so many images that the work outweighs waking it: 32,768 values, as torch's own grain.
int64_t images_per_task(int64_t values) {
  return values > 0 ? 1 + 32768 / values : 1;
}

// total[i] = the maximum or mean over heads of source[h][i] (less minus[h][i]); the heads are `stride` values apart.
// The maximum propagates NaN, as torch.amax does.
template <class T>
void over_heads(const ImportanceParams& p, const T* source, const T* minus, int64_t count, T* total) {
  const auto value = [&](int64_t i) { return minus ? source[i] - minus[i] : source[i]; };
  for (int64_t i = 0; i < count; ++i) total[i] = value(i);
  for (int64_t h = 1; h < p.heads; ++h) {
    source += p.tokens;
    minus = minus ? minus + p.tokens : nullptr;
    if (p.aggregate == Aggregate::Mean) {
      for (int64_t i = 0; i < count; ++i) total[i] += value(i);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const T x = value(i);
        total[i] = ((x > total[i]) | (x != x)) ? x : total[i];
      }
    }
  }
  if (p.aggregate == Aggregate::Mean) {
    for (int64_t i = 0; i < count; ++i) total[i] /= static_cast<T>(p.heads);
  }
}

template <class T>
void importance_of(const ImportanceParams& p, const Parallel& parallel) {
  const int64_t count = p.tokens - p.prefix;
  const auto* diag = static_cast<const T*>(p.diag);
  const auto* colsum = static_cast<const T*>(p.colsum);
  const auto* cls_row = static_cast<const T*>(p.cls_row);
  const bool both = p.source == Source::Mixed || p.source == Source::Sum;
  auto body = [&](int64_t begin, int64_t end) {
    std::vector<T> second(both ? static_cast<size_t>(count) : 0);
    for (int64_t b = begin; b < end; ++b) {
      T* target = static_cast<T*>(p.importance) + b * count;
      const int64_t image = b * p.heads * p.tokens + p.prefix;
      const T* minus = p.subtract_diag ? diag + image : nullptr;
      if (p.source == Source::Cls) {
        over_heads<T>(p, cls_row + image, nullptr, count, target);
      } else if (p.source == Source::Image) {
        over_heads<T>(p, colsum + image, minus, count, target);
      } else {
        over_heads<T>(p, diag + image, nullptr, count, target);
      }
      if (!both) continue;
      over_heads<T>(p, colsum + image, minus, count, second.data());
      for (int64_t i = 0; i < count; ++i) {
        target[i] = p.source == Source::Mixed ? target[i] * second[i] : target[i] + second[i];
      }
    }
  };
  if (p.heads > 0 && count > 0) parallel_for(parallel, p.batch, images_per_task(p.heads * p.tokens), body);
}

// An unsigned order in which NaN is 0, -0 equals 0 and everything else follows the numbers.
template <class T, class Bits>
Bits ordered(T value) {
  if (value != value) return 0;
  value += T(0);
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  constexpr Bits sign = Bits{1} << (8 * sizeof(Bits) - 1);
  return bits & sign ? ~bits : bits | sign;
}

template <class Bits>
struct Entry {
  Bits key;
  uint32_t index;
};

template <class T, class Bits>
void select_of(const SelectParams& p, const Parallel& parallel) {
  const int64_t kept = p.count - p.prop;
  auto body = [&](int64_t begin, int64_t end) {
    std::vector<Entry<Bits>> entries(static_cast<size_t>(p.count));
    std::vector<char> leaves(p.by_index ? static_cast<size_t>(p.count) : 0);
    const auto before = [](const Entry<Bits>& a, const Entry<Bits>& b) {
      return a.key > b.key || (a.key == b.key && a.index < b.index);
    };
    for (int64_t b = begin; b < end; ++b) {
      const T* importance = static_cast<const T*>(p.importance) + b * p.count;
      int64_t* index_kept = p.index_kept + b * kept;
      int64_t* index_prop = p.index_prop + b * p.prop;
      for (int64_t i = 0; i < p.count; ++i) entries[i] = {ordered<T, Bits>(importance[i]), static_cast<uint32_t>(i)};
      if (!p.by_index) {
        std::sort(entries.begin(), entries.end(), before);
        for (int64_t i = 0; i < kept; ++i) index_kept[i] = entries[i].index + p.prefix;
        for (int64_t i = 0; i < p.prop; ++i) index_prop[i] = entries[kept + i].index + p.prefix;
        continue;
      }
      std::fill(leaves.begin(), leaves.end(), 0);
      if (p.prop > 0 && kept > 0) std::nth_element(entries.begin(), entries.begin() + kept, entries.end(), before);
      for (int64_t i = kept; i < p.count; ++i) leaves[entries[i].index] = 1;
      for (int64_t i = 0; i < p.count; ++i) *(leaves[i] ? index_prop++ : index_kept++) = i + p.prefix;
    }
  };
  parallel_for(parallel, p.batch, images_per_task(4 * p.count), body);
}

}  // namespace

void token_importance(const ImportanceParams& p, const Parallel& parallel) {
  if (p.dtype == DType::Float64) {
    importance_of<double>(p, parallel);
  } else {
    importance_of<float>(p, parallel);
  }
}

void select_tokens(const SelectParams& p, const Parallel& parallel) {
  if (p.dtype == DType::Float64) {
    select_of<double, uint64_t>(p, parallel);
  } else {
    select_of<float, uint32_t>(p, parallel);
  }
}

}  // namespace gtp
