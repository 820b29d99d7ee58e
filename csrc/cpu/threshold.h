// Order statistics of float or double values by vector sweeps: the exact threshold of an attention map.
//
// Values are >= 0 or NaN. NaN counts as the largest value. `rank` is 1-based from the smallest.
// Arrays handed to collect() hold whole vectors; the padding is NaN, which no ordered comparison takes.
//
// map_threshold: a stratified sample (W values of every row) brackets the rank; one sweep counts what lies below and
// collects what lies strictly inside; kth() finds the rank among those few. Where the bracket misses, a wider one is
// tried. Where that misses too, or its contents outgrow the buffer, a radix selection in a sweep per byte gives the
// same value.
//
// A map is seen through `sweep`: sweep(body) calls body(row, share) for its rows in order, whose values are
// row[j] * share, and stops where the body returns false.
#pragma once

#include "vec.h"

namespace gtp {
namespace GTP_ISA {

// What sweeps have seen so far.
struct Counts {
  int64_t up_to = 0;    // values <= low
  int64_t between = 0;  // low < values < high, written to the target
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each 8-bit mask the lanes that it keeps, packed to the front, one byte each.
struct CompressTable {
  uint64_t lanes[256];
  constexpr CompressTable() : lanes{} {
    for (int mask = 0; mask < 256; ++mask) {
      uint64_t packed = 0;
      int count = 0;
      for (uint64_t lane = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) packed |= lane << (8 * count++);
      }
      lanes[mask] = packed;
    }
  }
};
static constexpr CompressTable kCompress{};
#endif

// Appends the lanes of v where inside is set to target; writes up to one whole vector, returns how many lanes count.
template <class T>
GTP_INLINE int compress(typename Vec<T>::V v, typename Vec<T>::I inside, T* target) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __mmask16 mask = _mm512_movepi32_mask((__m512i)inside);
    _mm512_storeu_ps(target, _mm512_maskz_compress_ps(mask, (__m512)v));
    return __builtin_popcount(mask);
  } else {
    const __mmask8 mask = _mm512_movepi64_mask((__m512i)inside);
    _mm512_storeu_pd(target, _mm512_maskz_compress_pd(mask, (__m512d)v));
    return __builtin_popcount(mask);
  }
#else
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const int mask = _mm256_movemask_ps((__m256)inside);
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kCompress.lanes[mask])));
    _mm256_storeu_ps(target, _mm256_permutevar8x32_ps((__m256)v, lanes));
    return __builtin_popcount(mask);
  }
#endif
  int count = 0;
  for (int i = 0; i < Vec<T>::W; ++i) {
    target[count] = v[i];
    count += inside[i] != 0;
  }
  return count;
#endif
}

// One sweep over the values source[i] * share (a multiple of W of them), added to `counts`; what lies between is
// appended to the target, which may be the source and needs room for one vector more than it receives.
template <class T>
GTP_INLINE void collect(const T* source, int64_t count, T share, T low, T high, T* target, Counts& counts) {
  const auto vlow = splat(low), vhigh = splat(high), vshare = splat(share);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    int64_t up_to = counts.up_to, between = counts.between;
    for (int64_t i = 0; i < count; i += 16) {
      const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(source + i), (__m512)vshare);
      const __mmask16 below_high = _mm512_cmp_ps_mask(v, (__m512)vhigh, _CMP_LT_OQ);
      const __mmask16 to_low = _mm512_cmp_ps_mask(v, (__m512)vlow, _CMP_LE_OQ);
      const __mmask16 inside = _kandn_mask16(to_low, below_high);
      _mm512_storeu_ps(target + between, _mm512_maskz_compress_ps(inside, v));
      between += __builtin_popcount(inside);
      up_to += __builtin_popcount(to_low);
    }
    counts = {up_to, between};
    return;
  }
#endif
  typename Vec<T>::I up_to{};
  int64_t between = counts.between;
  for (int64_t i = 0; i < count; i += Vec<T>::W) {
    const auto v = load(source + i) * vshare;
    up_to -= v <= vlow;
    between += compress<T>(v, (v > vlow) & (v < vhigh), target + between);
  }
  counts.up_to += reduce_count<T>(up_to);
  counts.between = between;
}

template <class T>
GTP_INLINE int64_t count_equal(const T* source, int64_t count, T share, T value) {
  typename Vec<T>::I equal{};
  const auto v = splat(value), vshare = splat(share);
  for (int64_t i = 0; i < count; i += Vec<T>::W) equal -= load(source + i) * vshare == v;
  return reduce_count<T>(equal);
}

template <class T>
GTP_INLINE void pad_with_nan(T* values, int64_t count) {
  store(values + count, splat(Vec<T>::nan));
}

// The bits of a value in an order where NaN is the largest.
template <class T>
GTP_INLINE typename Vec<T>::Bits radix_key(T value) {
  using Bits = typename Vec<T>::Bits;
  return value == value ? bits_as<Bits>(value) : ~Bits{0};
}

// Exact for any input: 8 bits of the key at a time, most significant first, over rows of `columns` values.
template <class T, class Sweep>
static T radix_kth(const Sweep& sweep, int64_t columns, int64_t rank) {
  using Bits = typename Vec<T>::Bits;
  Bits prefix = 0, known = 0;
  for (int shift = 8 * sizeof(T) - 8; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {0};
    sweep([&](const T* row, T share) {
      for (int64_t j = 0; j < columns; ++j) {
        const Bits key = radix_key(row[j] * share);
        if ((key & known) == prefix) ++histogram[key >> shift & 255];
      }
      return true;
    });
    Bits digit = 0;
    while (digit < 255 && rank > histogram[digit]) rank -= histogram[digit++];
    prefix |= digit << shift;
    known |= Bits{255} << shift;
  }
  return prefix == ~Bits{0} ? Vec<T>::nan : bits_as<T>(prefix);
}

constexpr int64_t kSmall = 64;

// Adds one to the lanes of `count` where x < v.
template <class T>
GTP_INLINE typename Vec<T>::I count_below(typename Vec<T>::I count, typename Vec<T>::V x, typename Vec<T>::V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __mmask16 below = _mm512_cmp_ps_mask((__m512)x, (__m512)v, _CMP_LT_OQ);
    const __m512i n = (__m512i)count;
    return (typename Vec<T>::I)_mm512_mask_sub_epi32(n, below, n, _mm512_set1_epi32(-1));
  }
#endif
  return count - (x < v);
}

// For each of count <= kSmall values without NaN, padded with NaN to whole vectors, how many of them lie below it.
template <class T>
struct SmallRanks {
  static constexpr int W = Vec<T>::W;
  using I = typename Vec<T>::I;
  const T* values;
  int64_t count;
  I below[kSmall / W];

  GTP_INLINE_MEMBER SmallRanks(const T* values, int64_t count) : values(values), count(count) {
    for (int64_t i = 0; i < count; i += W) {
      const auto v = load(values + i);
      I less{};
      for (int64_t j = 0; j < count; ++j) less = count_below<T>(less, splat(values[j]), v);
      below[i / W] = less;
    }
  }
  // The rank-th smallest, 1 <= rank <= count: the largest of the values that fewer than rank lie below.
  GTP_INLINE_MEMBER T find(int64_t rank) const {
    auto largest = splat(-Vec<T>::inf);
    for (int64_t i = 0; i < count; i += W) {
      const auto v = load(values + i);
      const auto r = I{} + static_cast<typename Vec<T>::Int>(rank);
      const auto candidate = ((below[i / W] < r) & (v == v)) ? v : splat(-Vec<T>::inf);
      largest = candidate > largest ? candidate : largest;
    }
    return reduce_max<T>(largest);
  }
};

// The values strictly between two of a sample of kSmall, which probably hold the ranks from `first` to `last`.
template <class T>
struct Narrowed {
  T low, high;
  Counts counts;

  // values: padded with NaN; target: room for count + 2 W
  Narrowed(const T* values, int64_t count, int64_t first, int64_t last, T* target) {
    constexpr int W = Vec<T>::W;
    alignas(64) T sample[kSmall + W];
    for (int64_t i = 0; i < kSmall; ++i) sample[i] = values[(2 * i + 1) * count / (2 * kSmall)];
    pad_with_nan(sample, kSmall);
    const int64_t low_rank = first * kSmall / count - 8, high_rank = last * kSmall / count + 9;
    const SmallRanks<T> ranks(sample, kSmall);
    low = ranks.find(low_rank < 1 ? 1 : low_rank);
    high = ranks.find(high_rank > kSmall ? kSmall : high_rank);
    collect(values, (count + W - 1) / W * W, T(1), low, high, target, counts);
  }
};

// The rank-th of `count` values without NaN, 1 <= rank <= count. `values` and `other` are both overwritten and have
// room for count + 2 W. Each round keeps what lies between two values of a sample, or on the side that the sample
// misjudged.
template <class T>
static T kth(T* values, int64_t count, int64_t rank, T* other) {
  constexpr int W = Vec<T>::W;
  for (int round = 0;; ++round) {
    pad_with_nan(values, count);
    if (count <= kSmall) return SmallRanks<T>(values, count).find(rank);
    if (round == 32) return radix_kth<T>([&](const auto& body) { body(values, T(1)); }, count, rank);
    const Narrowed<T> part(values, count, rank, rank, other);
    const T low = part.low, high = part.high;
    const int64_t up_to = part.counts.up_to, between = part.counts.between;
    const int64_t padded = (count + W - 1) / W * W;
    if (rank <= up_to) {
      if (rank > up_to - count_equal(values, padded, T(1), low)) return low;
      Counts side;
      collect(values, padded, T(1), T(-1), low, other, side);
      count = side.between;
    } else if (rank <= up_to + between) {
      rank -= up_to;
      count = between;
    } else {
      const int64_t up_to_high = up_to + between + (high > low ? count_equal(values, padded, T(1), high) : int64_t{0});
      if (rank <= up_to_high) return high;
      rank -= up_to_high;
      Counts side;
      collect(values, padded, T(1), high, Vec<T>::inf, other, side);
      count = side.between;
      if (rank > count) return Vec<T>::inf;  // the rest are infinite
    }
    T* swap = values;
    values = other;
    other = swap;
  }
}

// The values of two ranks, first <= last, of which those outside 1 to count keep `low` and `high` as they are.
// `values` has room for twice as much as `other`.
template <class T>
static void kth_two(T* values, int64_t count, int64_t first, int64_t last, T* other, T& low, T& high) {
  constexpr int W = Vec<T>::W;
  T* copy = values + (count + 2 * W);
  int64_t skipped = 0;
  if (first >= 1 && last <= count && count > kSmall) {
    pad_with_nan(values, count);
    const Counts counts = Narrowed<T>(values, count, first, last, copy).counts;
    if (first > counts.up_to && last <= counts.up_to + counts.between) {
      skipped = counts.up_to;
      count = counts.between;
      for (int64_t i = 0; i < count; i += W) store(values + i, load(copy + i));
    }
  }
  if (skipped == 0) {
    for (int64_t i = 0; i < count; i += W) store(copy + i, load(values + i));
  }
  if (first >= 1) low = kth(values, count, first - skipped, other);
  if (last <= skipped + count) high = kth(copy, count, last - skipped, other);
}

// The sample of a map: W values of each row that follow each other, row i from column i * sample_step on, modulo the
// tokens: each column as often as any other, as they differ more than rows do, and in rows far apart. Maps of up to
// kUnsampled values and rows shorter than a vector are collected whole.
constexpr int64_t kUnsampled = 4096;

template <class T>
GTP_INLINE bool is_sampled(int64_t tokens) {
  return tokens * tokens > kUnsampled && tokens >= Vec<T>::W;
}

// The squared distance of two nearest places of a sample with such a step, rows and columns taken modulo the tokens:
// the shortest vector of the lattice of (1, step) and (0, tokens), by Gauss's reduction. -1 where step and tokens have
// a common factor.
static double sample_distance(int64_t tokens, int64_t step) {
  double a[2] = {1, static_cast<double>(step)}, b[2] = {0, static_cast<double>(tokens)};
  double shorter = a[0] * a[0] + a[1] * a[1], longer = b[0] * b[0] + b[1] * b[1];
  while (shorter < longer) {
    const double times = __builtin_rint((a[0] * b[0] + a[1] * b[1]) / shorter);
    const double rest[2] = {b[0] - times * a[0], b[1] - times * a[1]};
    b[0] = a[0], b[1] = a[1], a[0] = rest[0], a[1] = rest[1];
    longer = shorter, shorter = a[0] * a[0] + a[1] * a[1];
  }
  for (int64_t x = tokens, y = step; y;) {
    const int64_t rest = x % y;
    x = y, y = rest;
    if (y == 0 && x > 1) return -1;
  }
  return longer;
}

// Next to the golden section of the tokens the step whose places are farthest apart.
static int64_t sample_step(int64_t tokens) {
  const int64_t section = static_cast<int64_t>(static_cast<double>(tokens) * 0.6180339887498949);
  int64_t step = 1;
  double farthest = 0;
  for (int64_t candidate = section - 4; candidate <= section + 4; ++candidate) {
    const double distance = sample_distance(tokens, candidate);
    if (distance > farthest) farthest = distance, step = candidate;
  }
  return step;
}

template <class T>
GTP_INLINE void sample_row(const T* row, T share, int64_t i, int64_t step, int64_t tokens, T* target) {
  constexpr int W = Vec<T>::W;
  const int64_t place = i * step % tokens;
  typename Vec<T>::V v;
  if (place + W <= tokens) {
    v = load(row + place);
  } else {
    for (int lane = 0; lane < W; ++lane) v[lane] = row[place + lane < tokens ? place + lane : place + lane - tokens];
  }
  v *= splat(share);
  store(target + i * W, v == v ? v : splat(Vec<T>::inf));
}

// Room that map_threshold needs in each of its two buffers: for the sample twice, and for the contents of the bracket,
// which is wide where rows are few and the sample takes few values of each, and holds about 1 % of the map where they
// are thousands.
template <class T>
GTP_INLINE int64_t threshold_room(int64_t tokens) {
  constexpr int W = Vec<T>::W;
  const int64_t total = tokens * tokens, part = tokens <= 1024 ? 6 : W >= 16 ? 48 : W >= 8 ? 32 : W >= 4 ? 20 : 12;
  return total / part + 16 * tokens + 4096 + 2 * W * tokens + 8 * W;
}

// The rank-th smallest of the tokens * tokens values of a map whose rows are padded with NaN to whole vectors. The
// first buffer begins with the sample, where the map is_sampled.
template <class T, class Sweep>
static T map_threshold(const Sweep& sweep, int64_t tokens, int64_t rank, bool force_miss, T* first, T* second) {
  constexpr int W = Vec<T>::W;
  const int64_t padded = (tokens + W - 1) / W * W;
  const int64_t room = threshold_room<T>(tokens) - 2 * W;
  const auto count_in_map = [&](T value) {
    int64_t equal = 0;
    sweep([&](const T* row, T share) {
      equal += count_equal(row, padded, share, value);
      return true;
    });
    return equal;
  };
  // A bracket of twice the width where the first one misses: a map may differ more within itself than chance has it.
  for (double deviations = 4; deviations <= 8 && !force_miss; deviations *= 2) {
    T low = T(-1), high = Vec<T>::inf;
    if (is_sampled<T>(tokens)) {
      const int64_t sampled = tokens * W;
      const double share = static_cast<double>(rank) / static_cast<double>(tokens * tokens);
      const double middle = share * static_cast<double>(sampled);
      const double margin = 2.0 + deviations * __builtin_sqrt(middle * (1.0 - share) + 0.25);
      if (deviations > 4) {
        if (2 * margin / W * static_cast<double>(tokens) > static_cast<double>(room - padded)) break;
        int64_t i = 0;
        const int64_t step = sample_step(tokens);
        sweep([&](const T* row, T share_of_row) {
          sample_row(row, share_of_row, i++, step, tokens, first);
          return true;
        });
      }
      kth_two(first, sampled, static_cast<int64_t>(middle - margin), static_cast<int64_t>(middle + margin) + 1, second,
              low, high);
      if (low > high) low = high;
    }
    Counts counts;
    bool fits = true;
    sweep([&](const T* row, T share) {
      fits = counts.between + padded <= room;
      if (fits) collect(row, padded, share, low, high, first, counts);
      return fits;
    });
    if (!fits) break;
    const int64_t up_to = counts.up_to, between = counts.between;
    if (rank > up_to && rank <= up_to + between) return kth(first, between, rank - up_to, second);
    if (rank <= up_to && rank > up_to - count_in_map(low)) return low;
    if (rank > up_to + between && high > low && rank <= up_to + between + count_in_map(high)) return high;
    if (!is_sampled<T>(tokens)) break;
  }
  return radix_kth<T>(sweep, tokens, rank);
}

}  // namespace GTP_ISA
}  // namespace gtp
