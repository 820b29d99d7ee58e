// The backward of attention_with_scores: the gradients of q, k and v from that of out, dO.
//
// With A the softmax map, M = not (A < T) its mask and dA = (dO v^T) o M:
//   dv = (A o M)^T dO,  dS = A o (dA - sum_j A_j dA_j) scale,  dq = dS k,  dk = dS^T q.
//
// One (image, head) is one task. 10 N^2 d FLOPs, beyond kWholeMap tokens 14 N^2 d with a threshold. Map and threshold
// are computed again (attention_map.h). Blocks of kRows rows make A o M and dS for a part of some 128 rows, whose
// transposes are then multiplied at once: beside the map of up to kWholeMap tokens nothing of size N^2 is kept.

#include "attention_map.h"

namespace gtp {
namespace GTP_ISA {
namespace {

constexpr int64_t kPartBlocks = 128 / kRows;

// E is what the forward multiplied: its products decide which entries are at the threshold.
template <class T, class E>
struct Backward {
  static constexpr int W = Vec<T>::W;
  using V = typename Vec<T>::V;
  using I = typename Vec<T>::I;

  const AttentionBackwardParams& p;
  SoftmaxMap<T, E> map;
  const int64_t tokens, size;
  const Panels panels, token_panels;  // of the head size, of the tokens
  const int64_t width;                // the head size, rounded up to whole vectors
  const int64_t padded, columns, ld;  // tokens, rounded up to kRows, and to whole vectors too; the row stride of a part
  const int64_t blocks, parts, most;  // whole blocks of a head; its parts; the rows of the largest one
  const bool in_place;                // grad_q takes whole vectors of T

  T *values, *keys, *grads, *queries;  // packed: v^T; k; and the rows of the part of dO and q
  T *weights, *steps;                  // of the part: A o M and dS, [most, ld]
  T *grad_k, *grad_v;                  // [padded, width]
  T* rows;                             // [max(kRows, kPackRows), width]
  I tail;                              // the lanes of a row's last vector that hold tokens

  explicit Backward(const AttentionBackwardParams& params)
      : p(params),
        map(params.attention),
        tokens(map.tokens),
        size(params.attention.head_size),
        panels((size + W - 1) / W),
        token_panels((tokens + W - 1) / W),
        width(panels.vectors * W),
        padded((tokens + kRows - 1) / kRows * kRows),
        columns(padded > map.width ? padded : map.width),
        ld(columns % (4096 / sizeof(T)) == 0 ? columns + W : columns),
        blocks(tokens > kRows ? tokens / kRows : 1),
        parts((blocks + kPartBlocks - 1) / kPartBlocks),
        most((blocks + parts - 1) / parts * kRows + kRows - 1),
        in_place(width == size && params.attention.dtype == (sizeof(T) == 4 ? DType::Float32 : DType::Float64)) {
    typename Vec<T>::Int lanes[W];
    for (int64_t i = 0; i < W; ++i) lanes[i] = map.width - W + i < tokens ? -1 : 0;
    __builtin_memcpy(&tail, lanes, sizeof tail);
  }

  static constexpr int64_t kBuffered = kRows > kPackRows ? kRows : kPackRows;

  size_t bytes() const {
    return map.bytes() + Scratch::bytes<T>(size * map.width) + Scratch::bytes<T>(tokens * width) +
           2 * Scratch::bytes<T>(most * width) + 2 * Scratch::bytes<T>(most * ld) +
           2 * Scratch::bytes<T>(padded * width) + Scratch::bytes<T>(kBuffered * width);
  }

  void carve(Scratch& scratch) {
    map.carve(scratch);
    values = scratch.take<T>(size * map.width);
    keys = scratch.take<T>(tokens * width);
    grads = scratch.take<T>(most * width);
    queries = scratch.take<T>(most * width);
    weights = scratch.take<T>(most * ld);
    steps = scratch.take<T>(most * ld);
    grad_k = scratch.take<T>(padded * width);
    grad_v = scratch.take<T>(padded * width);
    rows = scratch.take<T>(kBuffered * width);
  }

  // Row i of one head of a [B, H, N, d] array; `ahead` rows on, the next to be packed is asked for.
  struct Head {
    const void* data;
    DType dtype;
    int64_t offset, stride, inner, count, size;
    GTP_INLINE_MEMBER const T* row(int64_t i, T* buffer) const {
      if (i + kPackRows < count) prefetch_row(data, dtype, offset + (i + kPackRows) * stride, size);
      return load_row(data, dtype, offset + i * stride, inner, size, buffer);
    }
  };

  Head head_of(const void* data, const int64_t* strides, int64_t b, int64_t h) const {
    return {data, p.attention.dtype, b * strides[0] + h * strides[1], strides[2], strides[3], tokens, size};
  }

  void pack_part(const Head& head, int64_t begin, int64_t count, T* packed) {
    pack_rows(count, size, panels, [&](int64_t i) { return head.row(begin + i, rows); }, packed);
  }

  V inside(V x, int64_t j) const {
    return j + W > tokens ? (tail ? x : V{}) : x;
  }

  // One row: from e and, in `step`, dO v^T to A o M and dS.
  template <bool MASKED>
  void differentiate(const T* e, T share, T threshold, T* weight, T* step) const {
    const V factor = splat(share), t = splat(threshold);
    V dots{};
    for (int64_t j = 0; j < map.width; j += W) {
      const V a = inside(load(e + j) * factor, j);
      V kept = a, grad = inside(load(step + j), j);
      if (MASKED) {
        kept = a < t ? V{} : a;
        grad = a < t ? V{} : grad;
      }
      store(weight + j, kept);
      store(step + j, grad);
      dots += a * grad;
    }
    const V dot = splat(reduce_sum<T>(dots)), scale = splat(static_cast<T>(p.attention.scale));
    for (int64_t j = 0; j < map.width; j += W) {
      const V a = inside(load(e + j) * factor, j);
      store(step + j, a * (load(step + j) - dot) * scale);
    }
    for (int64_t j = map.width; j < columns; ++j) weight[j] = step[j] = 0;
  }

  void run_block(const Head& grad_out, int64_t b, int64_t h, int64_t i0, int64_t count, T threshold, T* weight,
                 T* step) {
    const T* e = map.masked ? map.rows(i0, count) : map.compute(i0, count);
    const T* left =
        load_row(grad_out.data, grad_out.dtype, grad_out.offset + i0 * grad_out.stride, grad_out.inner, size, rows);
    int64_t left_ld = grad_out.stride;
    if (left == rows) {
      left_ld = width;
      for (int64_t i = 1; i < count; ++i) grad_out.row(i0 + i, rows + i * width);
    }
    multiply(count, size, left, left_ld, values, token_panels, step, ld);
    for (int64_t i = 0; i < count; ++i) {
      if (map.masked) {
        differentiate<true>(e + i * map.ld, map.share[i0 + i], threshold, weight + i * ld, step + i * ld);
      } else {
        differentiate<false>(e + i * map.ld, map.share[i0 + i], threshold, weight + i * ld, step + i * ld);
      }
    }
    const int64_t out0 = ((b * p.attention.heads + h) * tokens + i0) * size;
    if (in_place) {
      multiply(count, tokens, step, ld, keys, panels, static_cast<T*>(p.grad_q) + out0, size);
      return;
    }
    multiply(count, tokens, step, ld, keys, panels, rows, width);
    for (int64_t i = 0; i < count; ++i) store_row(rows + i * width, p.grad_q, p.attention.dtype, out0 + i * size, size);
  }

  void run(int64_t b, int64_t h) {
    const AttentionParams& a = p.attention;
    const Head q = head_of(a.q, a.stride_q, b, h), k = head_of(a.k, a.stride_k, b, h);
    const Head v = head_of(a.v, a.stride_v, b, h), grad_out = head_of(p.grad_out, p.stride_grad_out, b, h);
    map.enter(b, h);
    pack_transposed_all<T>(
        size, tokens, token_panels, [&](int64_t j, int slot) { return v.row(j, rows + slot * width); }, values);
    pack_part(k, 0, tokens, keys);
    for (int64_t i = 0; i < padded * width; ++i) grad_k[i] = grad_v[i] = 0;
    const T threshold = map.masked ? map.threshold() : T(0);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = blocks * part / parts * kRows;
      const int64_t end = part + 1 < parts ? blocks * (part + 1) / parts * kRows : tokens;
      for_blocks(begin, end, [&](int64_t i0, int64_t count, int64_t) {
        run_block(grad_out, b, h, i0, count, threshold, weights + (i0 - begin) * ld, steps + (i0 - begin) * ld);
      });
      pack_part(grad_out, begin, end - begin, grads);
      pack_part(q, begin, end - begin, queries);
      accumulate_transposed(tokens, end - begin, weights, ld, grads, panels, grad_v, width);
      accumulate_transposed(tokens, end - begin, steps, ld, queries, panels, grad_k, width);
    }
    const int64_t out0 = (b * a.heads + h) * tokens * size;
    for (int64_t i = 0; i < tokens; ++i) {
      store_row(grad_k + i * width, p.grad_k, a.dtype, out0 + i * size, size);
      store_row(grad_v + i * width, p.grad_v, a.dtype, out0 + i * size, size);
    }
  }
};

template <class T, class E>
void run_backward(const AttentionBackwardParams& p, const Parallel& parallel) {
  auto body = [&](int64_t begin, int64_t end) {
    Backward<T, E> backward(p);
    Scratch scratch(backward.bytes());
    backward.carve(scratch);
    for (int64_t t = begin; t < end; ++t) backward.run(t / p.attention.heads, t % p.attention.heads);
#if defined(GTP_AMX)
    if constexpr (!Vec<E>::is_floating) tile_release();
#endif
  };
  parallel_for(parallel, p.attention.batch * p.attention.heads, 1, body);
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p, const Parallel& parallel) {
  if (p.attention.tokens == 0 || p.attention.head_size == 0) return;
  if (p.attention.dtype == DType::Float64) return run_backward<double, double>(p, parallel);
#if defined(__AVX512BF16__)
  if (p.attention.dtype == DType::BFloat16) return run_backward<float, Pair>(p, parallel);
#endif
  run_backward<float, float>(p, parallel);
}

}  // namespace GTP_ISA
}  // namespace gtp
