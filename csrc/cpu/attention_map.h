// The softmax map of one image and head, in blocks of rows, and its exact threshold: what the attention and its
// backward share.
//
// E is what the products multiply: T itself, or pairs of bfloat16. A row is held as e = exp(logit - maximum of the
// row), and p = e * share with share = 1 / sum of e. Up to kWholeMap tokens the map is kept (in the thread's scratch);
// beyond, a sweep computes its rows again, from the same products in the same order, so that every sweep sees the same
// bits.
#pragma once

#include "dtype.h"
#include "gemm.h"
#include "kernels.h"
#include "scratch.h"
#include "threshold.h"
#include "vec.h"

namespace gtp {
namespace GTP_ISA {

// A map that has left the thread's L2 is still read faster than it is computed again; this bounds what a thread keeps.
constexpr int64_t kWholeMap = 1536;

// One row of [B, H, N, d] as the operand of a product: in place, or in `buffer`.
template <class E>
GTP_INLINE const E* operand_row(const void* data, DType dtype, int64_t offset, int64_t stride, int64_t size,
                                E* buffer) {
  if constexpr (sizeof(E) == sizeof(typename Operand<E>::Result) && Vec<E>::is_floating) {
    return load_row(data, dtype, offset, stride, size, buffer);
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(data) + offset;
    uint16_t* target = reinterpret_cast<uint16_t*>(buffer);
    if (stride == 1) {
      __builtin_memcpy(target, source, static_cast<size_t>(size) * 2);
    } else {
      for (int64_t i = 0; i < size; ++i) target[i] = source[i * stride];
    }
    if (size % 2) target[size] = 0;
    return buffer;
  }
}

// Rows of one head lie kilobytes apart, which no hardware prefetcher follows: packing asks for them kPackRows ahead.
GTP_INLINE void prefetch_row(const void* data, DType dtype, int64_t offset, int64_t size) {
  const char* row = static_cast<const char*>(data) + offset * size_of(dtype);
  for (int64_t c = 0; c < size * size_of(dtype); c += 64) __builtin_prefetch(row + c);
}

// How many elements of E hold `size` values.
template <class E>
GTP_INLINE int64_t elements(int64_t size) {
  return Vec<E>::is_floating ? size : (size + 1) / 2;
}

// `count` rows of `size` values as the right-hand side of a product with them: row(j) gives a pointer to row j.
template <class T, class Row>
GTP_INLINE void pack_rows(int64_t count, int64_t size, const Panels& panels, const Row& row, T* packed) {
  constexpr int W = Vec<T>::W;
  for (int64_t j = 0; j < count; ++j) {
    const T* source = row(j);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t start = panels.start(panel) * W, width = panels.width(panel) * W;
      T* target = packed + start * count + j * width;
      if (start + width <= size) {
        for (int64_t c = 0; c < width; c += W) store(target + c, load(source + start + c));
      } else {
        for (int64_t c = 0; c < width; ++c) target[c] = start + c < size ? source[start + c] : T(0);
      }
    }
  }
}

// A row of bfloat16 values at any stride.
struct Strided {
  const uint16_t* data;
  int64_t stride;
  GTP_INLINE_MEMBER uint32_t operator[](int64_t i) const {
    return data[i * stride];
  }
};

#if defined(__AVX512BF16__)
// 16 pairs of the values of two rows.
GTP_INLINE Vec<Pair>::V zip(const uint16_t* even, const uint16_t* odd) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
  return (Vec<Pair>::V)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// The same of bfloat16 rows, two at a time.
template <class Row>
GTP_INLINE void pack_rows(int64_t count, int64_t size, const Panels& panels, const Row& row, Pair* packed) {
  for (int64_t j = 0; j < count; j += 2) {
    const bool pair = j + 1 < count;
    const Strided even = row(j), odd = row(pair ? j + 1 : j);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t start = panels.start(panel) * 16, width = panels.width(panel) * 16;
      Pair* target = packed + start * ((count + 1) / 2) + j / 2 * width;
      const int64_t inside = size - start < width ? size - start : width;
      int64_t c = 0;
      if (pair && even.stride == 1 && odd.stride == 1) {
        for (; c + 16 <= inside; c += 16) {
          store(target + c, zip(even.data + start + c, odd.data + start + c));
        }
      }
      for (; c < inside; ++c) {
        const uint32_t high = pair ? odd[start + c] : 0;
        target[c] = static_cast<Pair>(even[start + c] | high << 16);
      }
      for (int64_t c = inside; c < width; ++c) target[c] = Pair{};
    }
  }
}
#endif

// body(i0, count, fresh): blocks of BLOCK rows that cover rows begin to end; the last one overlaps the one before it,
// and its rows before `fresh` were in that one. Only fewer than BLOCK rows make a smaller block.
template <int64_t BLOCK = kRows, class Body>
GTP_INLINE void for_blocks(int64_t begin, int64_t end, const Body& body) {
  int64_t i0 = begin;
  for (; i0 + BLOCK <= end; i0 += BLOCK) body(i0, BLOCK, int64_t{0});
  if (i0 == end) return;
  if (end - begin < BLOCK) {
    body(begin, end - begin, int64_t{0});
  } else {
    body(end - BLOCK, BLOCK, BLOCK - (end - i0));
  }
}

template <class T, class E>
struct SoftmaxMap {
  static constexpr int W = Vec<T>::W;
  static constexpr int64_t kBlock = Operand<E>::kBlock;
  using V = typename Vec<T>::V;

  const AttentionParams& p;
  const int64_t tokens, depth;
  const Panels panels;
  const int64_t width;       // tokens, rounded up to whole vectors; the lanes beyond the last token are NaN
  const int64_t ld;          // row stride of the map
  const bool masked, whole;  // is there a threshold; is the map kept

  E *keys, *operands;
  T *bias, *map, *top, *share, *first, *second;
  int64_t image = -1, head = 0;

  explicit SoftmaxMap(const AttentionParams& params)
      : p(params),
        tokens(p.tokens),
        depth(elements<E>(p.head_size)),
        panels((p.tokens + W - 1) / W, Operand<E>::kWidest),
        width(panels.vectors * W),
        // A row stride of whole pages would put a block of rows into one cache set.
        ld(width % (4096 / sizeof(T)) == 0 ? width + W : width),
        masked(p.rank > 0),
        whole(p.rank > 0 && tokens <= kWholeMap) {}

  int64_t room() const {
    return masked ? threshold_room<T>(tokens) : 0;
  }
  int64_t map_rows() const {
    return whole ? tokens : kBlock;
  }
  static constexpr int64_t kOperands = kBlock > kPackRows ? kBlock : kPackRows;

  size_t bytes() const {
    return Scratch::bytes<E>(depth * width) + Scratch::bytes<E>(kOperands * depth) + Scratch::bytes<T>(width) +
           Scratch::bytes<T>(map_rows() * ld) + 2 * Scratch::bytes<T>(tokens) + 2 * Scratch::bytes<T>(room());
  }

  void carve(Scratch& scratch) {
    keys = scratch.take<E>(depth * width);
    operands = scratch.take<E>(kOperands * depth);
    bias = scratch.take<T>(width);
    map = scratch.take<T>(map_rows() * ld);
    top = scratch.take<T>(tokens);
    share = scratch.take<T>(tokens);
    first = scratch.take<T>(room());
    second = scratch.take<T>(room());
  }

  // Packs the keys of head h of image b; nothing else is known of its map yet.
  void enter(int64_t b, int64_t h) {
    if (b != image) set_bias(b);
    image = b;
    head = h;
    const int64_t k0 = b * p.stride_k[0] + h * p.stride_k[1];
    pack_transposed_all<E>(
        depth, tokens, panels,
        [&](int64_t j, int slot) {
          if (j + kPackRows < tokens) {
            prefetch_row(p.k, p.dtype, k0 + (j + kPackRows) * p.stride_k[2], p.head_size);
          }
          return operand_row(p.k, p.dtype, k0 + j * p.stride_k[2], p.stride_k[3], p.head_size, operands + slot * depth);
        },
        keys);
  }

  void set_bias(int64_t b) {
    for (int64_t j = 0; j < tokens; ++j) {
      const double s = p.token_scales.data ? load_scalar(p.token_scales, b * tokens + j) : 1.0;
      if constexpr (sizeof(T) == 4) {
        bias[j] = p.token_scales.data ? __builtin_logf(static_cast<float>(s)) : 0.0f;
      } else {
        bias[j] = p.token_scales.data ? __builtin_log(s) : 0.0;
      }
    }
    for (int64_t j = tokens; j < width; ++j) bias[j] = -Vec<T>::inf;
  }

  // What becomes of a row of a tile: scaled and biased into `target`, and its maximum lane by lane. A value of its own,
  // because what a lambda captures by reference is loaded again after every store.
  struct Scaled {
    V scale;
    const T* bias;
    T* target;
    int64_t ld;
    V* most;  // or nullptr

    template <class Values>
    GTP_INLINE_MEMBER void operator()(int64_t i, int64_t j, const Values& values) const {
      V largest = splat(-Vec<T>::inf);
      for (const V& s : values) {
        const V x = s * scale + load(bias + j);
        store(target + i * ld + j, x);
        largest = vmax(x, largest);
        j += W;
      }
      if (most) most[i] = vmax(largest, most[i]);
    }
  };

  // Rows i0 to i0 + count for the first time: e [count, ld], their maxima and shares.
  T* compute(int64_t i0, int64_t count) {
    T* target = whole ? map + i0 * ld : map;
    V most[kBlock];
    for (int i = 0; i < kBlock; ++i) most[i] = splat(-Vec<T>::inf);
    logits(i0, count, Scaled{splat(static_cast<T>(p.scale)), bias, target, ld, most});
    for (int64_t i = 0; i < count; ++i) {
      top[i0 + i] = reduce_max<T>(most[i]);
      share[i0 + i] = T(1) / exponentiate(target + i * ld, top[i0 + i]);
    }
    return target;
  }

  // The same once compute() has seen every row.
  const T* rows(int64_t i0, int64_t count) {
    if (whole) return map + i0 * ld;
    logits(i0, count, Scaled{splat(static_cast<T>(p.scale)), bias, map, ld, nullptr});
    for (int64_t i = 0; i < count; ++i) exponentiate(map + i * ld, top[i0 + i]);
    return map;
  }

  // The exact threshold of the map, after compute() of every row in order.
  T threshold() {
    const int64_t step = sample_step(tokens);
    for_blocks<kBlock>(0, tokens, [&](int64_t i0, int64_t count, int64_t fresh) {
      const T* e = compute(i0, count);
      if (!is_sampled<T>(tokens)) return;
      for (int64_t i = fresh; i < count; ++i) sample_row(e + i * ld, share[i0 + i], i0 + i, step, tokens, first);
    });
    const auto sweep = [&](const auto& body) {
      bool more = true;
      for_blocks<kBlock>(0, tokens, [&](int64_t i0, int64_t count, int64_t fresh) {
        if (!more) return;
        const T* e = rows(i0, count);
        for (int64_t i = fresh; i < count && more; ++i) more = body(e + i * ld, share[i0 + i]);
      });
    };
    return map_threshold(sweep, tokens, p.rank, p.force_miss, first, second);
  }

 private:
  template <class Finish>
  void logits(int64_t i0, int64_t count, const Finish& finish) {
    const int64_t q0 = image * p.stride_q[0] + head * p.stride_q[1] + i0 * p.stride_q[2];
    const E* a;
    int64_t lda = depth;
    if (Operand<E>::kAnywhere && p.stride_q[3] == 1 && p.head_size % 2 == 0 && p.stride_q[2] % 2 == 0) {
      a = reinterpret_cast<const E*>(static_cast<const uint16_t*>(p.q) + q0);
      lda = p.stride_q[2] / 2;
    } else {
      a = operand_row(p.q, p.dtype, q0, p.stride_q[3], p.head_size, operands);
      if (a != operands) lda = p.stride_q[2];
      for (int64_t i = 1; i < count && a == operands; ++i) {
        operand_row(p.q, p.dtype, q0 + i * p.stride_q[2], p.stride_q[3], p.head_size, operands + i * depth);
      }
    }
    // The rows of the next block, while this one is multiplied.
    for (int64_t i = count; i < 2 * count && i0 + i < tokens; ++i) {
      prefetch_row(p.q, p.dtype, q0 + i * p.stride_q[2], p.head_size);
    }
    multiply(count, depth, a, lda, keys, panels, finish);
  }

  // x becomes exp(x - top); returns the sum.
  T exponentiate(T* row, T maximum) {
    const V most = splat(maximum);
    V sum{};
    for (int64_t j = 0; j < width; j += W) {
      const V e = exp_negative(load(row + j) - most);
      store(row + j, e);
      sum += e;
    }
    for (int64_t j = tokens; j < width; ++j) row[j] = Vec<T>::nan;
    return reduce_sum<T>(sum);
  }
};

}  // namespace GTP_ISA
}  // namespace gtp
