// attention_with_scores: out = mask(softmax(q k^T scale + log s)) v, with the diagonal, column sums and first row of
// the masked map.
//
// One (image, head) is one task. 4 N^2 d FLOPs; K and V are packed once, Q is read in place, and the map lives in the
// scratch of the thread: N^2 values where a threshold needs all of them, kRows rows where none does. A block of kRows
// rows goes through product, softmax and (after the threshold) mask, sums and the product with V while it is in L1.
// The last block of a map overlaps the one before it, so that only N < kRows runs row by row: it computes the same
// values again, and adds to the column sums only the rows that are new.

#include "dtype.h"
#include "gemm.h"
#include "kernels.h"
#include "scratch.h"
#include "threshold.h"
#include "vec.h"

namespace gtp {
namespace GTP_ISA {
namespace {

template <class T>
struct Task {
  static constexpr int W = Vec<T>::W;
  using V = typename Vec<T>::V;

  const AttentionParams& p;
  const int64_t tokens, depth;
  const Panels key_panels, value_panels;
  const int64_t key_width, value_width;  // tokens and head_size, rounded up to whole vectors
  const int64_t ld;                      // row stride of the map
  const int64_t map_rows;
  const bool masked;

  T *keys, *values, *map, *bias, *colsum, *rows, *block, *first, *second;

  explicit Task(const AttentionParams& params)
      : p(params),
        tokens(p.tokens),
        depth(p.head_size),
        key_panels((p.tokens + W - 1) / W),
        value_panels((p.head_size + W - 1) / W),
        key_width(key_panels.vectors * W),
        value_width(value_panels.vectors * W),
        // A row stride of whole pages would put a block of rows into one cache set.
        ld(key_width % (4096 / sizeof(T)) == 0 ? key_width + W : key_width),
        map_rows(p.rank > 0 ? tokens : kRows),
        masked(p.rank > 0) {}

  int64_t room() const {
    return masked ? threshold_room<T>(tokens, ld) : 0;
  }

  size_t bytes() const {
    return Scratch::bytes<T>(depth * key_width) + Scratch::bytes<T>(tokens * value_width) +
           Scratch::bytes<T>(map_rows * ld) + 2 * Scratch::bytes<T>(key_width) +
           Scratch::bytes<T>((kRows > 4 ? kRows : 4) * depth) + Scratch::bytes<T>(kRows * value_width) +
           2 * Scratch::bytes<T>(room());
  }

  void carve(Scratch& scratch) {
    keys = scratch.take<T>(depth * key_width);
    values = scratch.take<T>(tokens * value_width);
    map = scratch.take<T>(map_rows * ld);
    bias = scratch.take<T>(key_width);
    colsum = scratch.take<T>(key_width);
    rows = scratch.take<T>((kRows > 4 ? kRows : 4) * depth);
    block = scratch.take<T>(kRows * value_width);
    first = scratch.take<T>(room());
    second = scratch.take<T>(room());
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
    for (int64_t j = tokens; j < key_width; ++j) bias[j] = -Vec<T>::inf;
  }

  void pack(int64_t b, int64_t h) {
    const int64_t k0 = b * p.stride_k[0] + h * p.stride_k[1];
    pack_transposed_all<T>(
        depth, tokens, key_panels,
        [&](int64_t j, int slot) {
          return load_row(p.k, p.dtype, k0 + j * p.stride_k[2], p.stride_k[3], depth, rows + slot * depth);
        },
        keys);
    const int64_t v0 = b * p.stride_v[0] + h * p.stride_v[1];
    for (int64_t j = 0; j < tokens; ++j) {
      const T* row = load_row(p.v, p.dtype, v0 + j * p.stride_v[2], p.stride_v[3], depth, rows);
      for (int64_t panel = 0; panel < value_panels.count; ++panel) {
        const int64_t start = value_panels.start(panel) * W, width = value_panels.width(panel) * W;
        T* target = values + start * tokens + j * width;
        if (start + width <= depth) {
          for (int64_t c = 0; c < width; c += W) store(target + c, load(row + start + c));
        } else {
          for (int64_t c = 0; c < width; ++c) target[c] = start + c < depth ? row[start + c] : T(0);
        }
      }
    }
  }

  // [count, key_width] logits without scale and bias, rows i0 to i0 + count of the map.
  void logits(int64_t b, int64_t h, int64_t i0, int64_t count, T* target) {
    const int64_t q0 = b * p.stride_q[0] + h * p.stride_q[1] + i0 * p.stride_q[2];
    const T* a = rows;
    int64_t lda = depth;
    if (p.stride_q[3] == 1 && p.dtype == (sizeof(T) == 4 ? DType::Float32 : DType::Float64)) {
      a = static_cast<const T*>(p.q) + q0;
      lda = p.stride_q[2];
    } else {
      for (int64_t i = 0; i < count; ++i) {
        T* buffer = rows + i * depth;
        load_row(p.q, p.dtype, q0 + i * p.stride_q[2], p.stride_q[3], depth, buffer);
      }
    }
    multiply(count, depth, a, lda, keys, key_panels, target, ld);
  }

  // The softmax of one row in place; lanes beyond the last token become NaN, which no comparison and no output takes.
  void softmax(T* row) {
    const V scale = splat(static_cast<T>(p.scale));
    V most = splat(-Vec<T>::inf);
    for (int64_t j = 0; j < key_width; j += W) {
      const V s = load(row + j) * scale + load(bias + j);
      store(row + j, s);
      most = vmax(s, most);
    }
    const V top = splat(reduce_max<T>(most));
    V sum{};
    for (int64_t j = 0; j < key_width; j += W) {
      const V e = exp_negative(load(row + j) - top);
      store(row + j, e);
      sum += e;
    }
    const V share = splat(T(1) / reduce_sum<T>(sum));
    for (int64_t j = 0; j < key_width; j += W) store(row + j, load(row + j) * share);
    for (int64_t j = tokens; j < key_width; ++j) row[j] = Vec<T>::nan;
  }

  // Masks rows i0 to i0 + count in place and adds those from `fresh` on to the column sums.
  void mask_and_sum(T* target, int64_t count, int64_t fresh, T threshold) {
    const V t = splat(threshold);
    for (int64_t j = 0; j < key_width; j += W) {
      V sum = load(colsum + j);
      V part{};
      for (int64_t i = 0; i < count; ++i) {
        V x = load(target + i * ld + j);
        if (masked) {
          x = x < t ? V{} : x;
          store(target + i * ld + j, x);
        }
        if (i >= fresh) part += x;
      }
      store(colsum + j, sum + part);
    }
  }

  void finish_block(int64_t b, int64_t h, int64_t i0, int64_t count, int64_t fresh, T threshold, T* target) {
    mask_and_sum(target, count, fresh, threshold);
    const int64_t scores = (b * p.heads + h) * tokens;
    T* diag = static_cast<T*>(p.diag) + scores;
    for (int64_t i = 0; i < count; ++i) diag[i0 + i] = target[i * ld + i0 + i];
    if (i0 == 0) {
      T* cls_row = static_cast<T*>(p.cls_row) + scores;
      for (int64_t j = 0; j < tokens; ++j) cls_row[j] = target[j];
    }
    const int64_t ldo = p.heads * depth;
    const int64_t out0 = ((b * tokens + i0) * p.heads + h) * depth;
    if (value_width == depth && p.dtype == (sizeof(T) == 4 ? DType::Float32 : DType::Float64)) {
      multiply(count, tokens, target, ld, values, value_panels, static_cast<T*>(p.out) + out0, ldo);
      return;
    }
    multiply(count, tokens, target, ld, values, value_panels, block, value_width);
    for (int64_t i = 0; i < count; ++i) store_row(block + i * value_width, p.out, p.dtype, out0 + i * ldo, depth);
  }

  // body(i0, count, fresh): blocks that cover all rows; the rows before `fresh` were in the block before.
  template <class Body>
  void for_blocks(Body body) {
    int64_t i0 = 0;
    for (; i0 + kRows <= tokens; i0 += kRows) body(i0, int64_t{kRows}, int64_t{0});
    if (i0 == tokens) return;
    if (tokens < kRows) {
      body(int64_t{0}, tokens, int64_t{0});
    } else {
      body(tokens - kRows, int64_t{kRows}, kRows - (tokens - i0));
    }
  }

  void run(int64_t b, int64_t h) {
    pack(b, h);
    for (int64_t j = 0; j < key_width; ++j) colsum[j] = 0;
    if (masked) {
      for_blocks([&](int64_t i0, int64_t count, int64_t) {
        logits(b, h, i0, count, map + i0 * ld);
        for (int64_t i = 0; i < count; ++i) softmax(map + (i0 + i) * ld);
      });
      const T threshold = map_threshold(map, tokens, ld, p.rank, p.force_miss, first, second);
      for_blocks([&](int64_t i0, int64_t count, int64_t fresh) {
        finish_block(b, h, i0, count, fresh, threshold, map + i0 * ld);
      });
    } else {
      for_blocks([&](int64_t i0, int64_t count, int64_t fresh) {
        logits(b, h, i0, count, map);
        for (int64_t i = 0; i < count; ++i) softmax(map + i * ld);
        finish_block(b, h, i0, count, fresh, T(0), map);
      });
    }
    T* target = static_cast<T*>(p.colsum) + (b * p.heads + h) * tokens;
    for (int64_t j = 0; j < tokens; ++j) target[j] = colsum[j];
  }
};

template <class T>
void run_attention(const AttentionParams& p, const Parallel& parallel) {
  auto body = [&](int64_t begin, int64_t end) {
    Task<T> task(p);
    Scratch scratch(task.bytes());
    task.carve(scratch);
    int64_t image = -1;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / p.heads;
      if (b != image) task.set_bias(b);
      image = b;
      task.run(b, t % p.heads);
    }
  };
  parallel_for(parallel, p.batch * p.heads, 1, body);
}

}  // namespace

void attention(const AttentionParams& p, const Parallel& parallel) {
  if (p.tokens == 0 || p.head_size == 0) return;
  if (p.dtype == DType::Float64) {
    run_attention<double>(p, parallel);
  } else {
    run_attention<float>(p, parallel);
  }
}

}  // namespace GTP_ISA
}  // namespace gtp
