// attention_with_scores: out = mask(softmax(q k^T scale + log s)) v, with the diagonal, column sums and first row of
// the masked map.
//
// One (image, head) is one task. 4 N^2 d FLOPs up to kWholeMap tokens, beyond it 8 N^2 d with a threshold; K and V are
// packed once, Q is read in place. A block of rows goes through mask, sums and the product with V while it is in
// L1. The map itself is that of attention_map.h.

#include "attention_map.h"

namespace gtp {
namespace GTP_ISA {
namespace {

template <class T, class E>
struct Forward {
  static constexpr int W = Vec<T>::W;
  static constexpr int64_t kBlock = Operand<E>::kBlock;
  using V = typename Vec<T>::V;

  const AttentionParams& p;
  SoftmaxMap<T, E> map;
  const int64_t tokens, size, depth;
  const Panels value_panels;
  const int64_t value_width;  // the head size, rounded up to whole vectors
  const int64_t block_ld;

  E *values, *block;
  T *colsum, *out_block, *row;

  explicit Forward(const AttentionParams& params)
      : p(params),
        map(params),
        tokens(p.tokens),
        size(p.head_size),
        depth(elements<E>(p.tokens)),
        value_panels((p.head_size + W - 1) / W, Operand<E>::kWidest),
        value_width(value_panels.vectors * W),
        block_ld(elements<E>(map.ld)) {}

  size_t bytes() const {
    return map.bytes() + Scratch::bytes<E>(depth * value_width) + Scratch::bytes<E>(kBlock * block_ld) +
           Scratch::bytes<T>(map.width) + Scratch::bytes<T>(kBlock * value_width) + Scratch::bytes<T>(size);
  }

  void carve(Scratch& scratch) {
    map.carve(scratch);
    values = scratch.take<E>(depth * value_width);
    block = scratch.take<E>(kBlock * block_ld);
    colsum = scratch.take<T>(map.width);
    out_block = scratch.take<T>(kBlock * value_width);
    row = scratch.take<T>(size);
  }

  void pack_values(int64_t b, int64_t h) {
    const int64_t v0 = b * p.stride_v[0] + h * p.stride_v[1];
    const auto offset = [&](int64_t j) {
      if (j + kPackRows < tokens) prefetch_row(p.v, p.dtype, v0 + (j + kPackRows) * p.stride_v[2], size);
      return v0 + j * p.stride_v[2];
    };
    if constexpr (Vec<E>::is_floating) {
      pack_rows(
          tokens, size, value_panels,
          [&](int64_t j) { return load_row(p.v, p.dtype, offset(j), p.stride_v[3], size, row); }, values);
    } else {
      pack_rows(
          tokens, size, value_panels,
          [&](int64_t j) { return Strided{static_cast<const uint16_t*>(p.v) + offset(j), p.stride_v[3]}; }, values);
    }
  }

  // p = e * share, masked: into the block that multiplies V, and added to the column sums from row `fresh` on.
  template <bool MASKED>
  void weigh(const T* e, const T* share, int64_t count, int64_t fresh, T threshold) {
    const V t = splat(threshold);
    for (int64_t j = 0; j < map.width; j += W) {
      V part{};
      for (int64_t i = 0; i < count; ++i) {
        V x = load(e + i * map.ld + j) * splat(share[i]);
        if (MASKED) x = x < t ? V{} : x;
        put(x, i, j);
        if (i >= fresh) part += x;
      }
      store(colsum + j, load(colsum + j) + part);
    }
  }

  void put(V x, int64_t i, int64_t j) {
    if constexpr (Vec<E>::is_floating) {
      store(block + i * block_ld + j, x);
    } else {
#if defined(__AVX512BF16__)
      const __m256i halves = (__m256i)_mm512_cvtneps_pbh((__m512)x);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(block + i * block_ld) + j), halves);
#endif
    }
  }

#if defined(__AVX512BF16__)
  // What becomes of a row of a tile of the product with V: bfloat16.
  struct Rounded {
    uint16_t* target;
    int64_t ld;

    template <class Values>
    GTP_INLINE_MEMBER void operator()(int64_t i, int64_t j, const Values& values) const {
      for (const V& x : values) {
        store_rounded(reinterpret_cast<BFloat16*>(target + i * ld + j), x);
        j += W;
      }
    }
  };
#endif

  void finish_block(int64_t b, int64_t h, const T* e, int64_t i0, int64_t count, int64_t fresh, T threshold) {
    const T* share = map.share + i0;
    const auto value = [&](int64_t i, int64_t j) {
      const T x = e[i * map.ld + j] * share[i];
      return map.masked && x < threshold ? T(0) : x;
    };
    if (map.masked) {
      weigh<true>(e, share, count, fresh, threshold);
    } else {
      weigh<false>(e, share, count, fresh, threshold);
    }
    const int64_t scores = (b * p.heads + h) * tokens;
    T* diag = static_cast<T*>(p.diag) + scores;
    for (int64_t i = 0; i < count; ++i) diag[i0 + i] = value(i, i0 + i);
    if (i0 == 0) {
      T* cls_row = static_cast<T*>(p.cls_row) + scores;
      for (int64_t j = 0; j < tokens; ++j) cls_row[j] = value(0, j);
    }
    if constexpr (!Vec<E>::is_floating) {
      for (int64_t i = 0; i < count && tokens % 2; ++i) {
        reinterpret_cast<uint16_t*>(block + i * block_ld)[tokens] = 0;
      }
    }
    const int64_t ldo = p.heads * size;
    const int64_t out0 = ((b * tokens + i0) * p.heads + h) * size;
    if (value_width == size && p.dtype == (sizeof(T) == 4 ? DType::Float32 : DType::Float64)) {
      multiply(count, depth, block, block_ld, values, value_panels, static_cast<T*>(p.out) + out0, ldo);
      return;
    }
#if defined(__AVX512BF16__)
    if constexpr (!Vec<E>::is_floating) {
      if (value_width == size) {
        multiply(count, depth, block, block_ld, values, value_panels,
                 Rounded{static_cast<uint16_t*>(p.out) + out0, ldo});
        return;
      }
    }
#endif
    multiply(count, depth, block, block_ld, values, value_panels, out_block, value_width);
    for (int64_t i = 0; i < count; ++i) store_row(out_block + i * value_width, p.out, p.dtype, out0 + i * ldo, size);
  }

  void run(int64_t b, int64_t h) {
    map.enter(b, h);
    pack_values(b, h);
    for (int64_t j = 0; j < map.width; ++j) colsum[j] = 0;
    const T threshold = map.masked ? map.threshold() : T(0);
    for_blocks<kBlock>(0, tokens, [&](int64_t i0, int64_t count, int64_t fresh) {
      const T* e = map.masked ? map.rows(i0, count) : map.compute(i0, count);
      finish_block(b, h, e, i0, count, fresh, threshold);
    });
    T* target = static_cast<T*>(p.colsum) + (b * p.heads + h) * tokens;
    for (int64_t j = 0; j < tokens; ++j) target[j] = colsum[j];
  }
};

template <class T, class E>
void run_attention(const AttentionParams& p, const Parallel& parallel) {
  auto body = [&](int64_t begin, int64_t end) {
    Forward<T, E> forward(p);
    Scratch scratch(forward.bytes());
    forward.carve(scratch);
    for (int64_t t = begin; t < end; ++t) forward.run(t / p.heads, t % p.heads);
#if defined(GTP_AMX)
    if constexpr (!Vec<E>::is_floating) tile_release();
#endif
  };
  parallel_for(parallel, p.batch * p.heads, 1, body);
}

}  // namespace

void attention(const AttentionParams& p, const Parallel& parallel) {
  if (p.tokens == 0 || p.head_size == 0) return;
  if (p.dtype == DType::Float64) return run_attention<double, double>(p, parallel);
#if defined(__AVX512BF16__)
  if (p.dtype == DType::BFloat16) return run_attention<float, Pair>(p, parallel);
#endif
  run_attention<float, float>(p, parallel);
}

}  // namespace GTP_ISA
}  // namespace gtp
