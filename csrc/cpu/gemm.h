// The one matrix product of this package: C[rows, panel] = A[rows, depth] * packed panel, accumulated in registers.
//
// The right-hand side is packed as panels of 1 to kPanel vectors: element (k, column) of panel p is
// base(p) + k * width(p) + column, all panels of a matrix back to back, padded with zeros to whole vectors.
// The left-hand side is read in place: element (i, k) is a[i * lda + k].
// Every element of C is one chain of multiply-adds over rising k, whatever the tile: equal rows give equal bits.
#pragma once

#include "vec.h"

namespace gtp {
namespace GTP_ISA {

// Accumulators: kRows * kPanel registers, and one register per panel vector beside them.
#if defined(__AVX512F__)
constexpr int kRows = 8, kPanel = 3;
#elif defined(__x86_64__) && defined(__AVX2__)
constexpr int kRows = 4, kPanel = 3;
#elif defined(__x86_64__)
constexpr int kRows = 4, kPanel = 2;
#else
constexpr int kRows = 8, kPanel = 3;
#endif

// How `vectors` columns of vectors are cut into panels as equal as can be.
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t vectors_) : vectors(vectors_), count((vectors_ + kPanel - 1) / kPanel) {}
  int64_t width(int64_t p) const {
    return vectors / count + (p < vectors % count);
  }
  int64_t start(int64_t p) const {
    const int64_t extra = vectors % count;
    return p * (vectors / count) + (p < extra ? p : extra);
  }
};

template <class T, int ROWS, int VECTORS>
static void multiply_tile(int64_t depth, const T* a, int64_t lda, const T* panel, T* c, int64_t ldc) {
  using V = typename Vec<T>::V;
  constexpr int W = Vec<T>::W;
  V sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = V{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    V b[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) b[j] = load(panel + k * (VECTORS * W) + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const V x = splat(a[i * lda + k]);
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) sum[i][j] += x * b[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) store(c + i * ldc + j * W, sum[i][j]);
  }
}

template <class T, int ROWS>
static void multiply_rows(int64_t depth, const T* a, int64_t lda, const T* packed, const Panels& panels, T* c,
                          int64_t ldc) {
  constexpr int W = Vec<T>::W;
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t start = panels.start(p) * W;
    const T* panel = packed + start * depth;
    switch (panels.width(p)) {
      case 1:
        multiply_tile<T, ROWS, 1>(depth, a, lda, panel, c + start, ldc);
        break;
      case 2:
        multiply_tile<T, ROWS, 2>(depth, a, lda, panel, c + start, ldc);
        break;
      default:
        multiply_tile<T, ROWS, kPanel>(depth, a, lda, panel, c + start, ldc);
    }
  }
}

// C[rows, panels.vectors * W] for rows == kRows or any rows >= 1; ldc >= panels.vectors * W.
template <class T>
static void multiply(int64_t rows, int64_t depth, const T* a, int64_t lda, const T* packed, const Panels& panels, T* c,
                     int64_t ldc) {
  if (rows == kRows) {
    multiply_rows<T, kRows>(depth, a, lda, packed, panels, c, ldc);
  } else {
    for (int64_t i = 0; i < rows; ++i) multiply_rows<T, 1>(depth, a + i * lda, lda, packed, panels, c + i * ldc, ldc);
  }
}

GTP_INLINE void transpose4(const float* const rows[4], int64_t k, float* target, int64_t stride) {
  vfloat4 r[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&r[i], rows[i] + k, 16);
#if defined(__clang__)
#define GTP_SHUFFLE4(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
  typedef int32_t vint4 __attribute__((vector_size(16)));
#define GTP_SHUFFLE4(a, b, ...) __builtin_shuffle(a, b, (vint4){__VA_ARGS__})
#endif
  const vfloat4 a = GTP_SHUFFLE4(r[0], r[1], 0, 4, 1, 5);
  const vfloat4 b = GTP_SHUFFLE4(r[2], r[3], 0, 4, 1, 5);
  const vfloat4 c = GTP_SHUFFLE4(r[0], r[1], 2, 6, 3, 7);
  const vfloat4 d = GTP_SHUFFLE4(r[2], r[3], 2, 6, 3, 7);
  const vfloat4 t[4] = {GTP_SHUFFLE4(a, b, 0, 1, 4, 5), GTP_SHUFFLE4(a, b, 2, 3, 6, 7), GTP_SHUFFLE4(c, d, 0, 1, 4, 5),
                        GTP_SHUFFLE4(c, d, 2, 3, 6, 7)};
#undef GTP_SHUFFLE4
  for (int i = 0; i < 4; ++i) __builtin_memcpy(target + i * stride, &t[i], 16);
}

// One panel of the transpose: element (k, column) = row(column)[k], zero for the columns beyond `count`.
// row(column, slot) gives a pointer to `depth` values that stays valid until the slot (0 to 3) is asked for again.
template <class T, class Row>
static void pack_transposed(int64_t depth, int64_t first, int64_t count, int64_t width, Row row, T* panel) {
  for (int64_t column = 0; column < width; column += 4) {
    const int64_t lanes = width - column < 4 ? width - column : 4;
    const int64_t valid = count - first - column < lanes ? count - first - column : lanes;
    const T* rows[4];
    for (int64_t i = 0; i < valid; ++i) rows[i] = row(first + column + i, static_cast<int>(i));
    int64_t k = 0;
    if constexpr (sizeof(T) == 4) {
      if (valid == 4) {
        for (; k + 4 <= depth; k += 4) transpose4(rows, k, panel + k * width + column, width);
      }
    }
    for (; k < depth; ++k) {
      for (int64_t i = 0; i < lanes; ++i) panel[k * width + column + i] = i < valid ? rows[i][k] : T(0);
    }
  }
}

// All panels of `count` rows of `depth` values, transposed.
template <class T, class Row>
static void pack_transposed_all(int64_t depth, int64_t count, const Panels& panels, Row row, T* packed) {
  constexpr int W = Vec<T>::W;
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t first = panels.start(p) * W;
    pack_transposed(depth, first, count, panels.width(p) * W, row, packed + first * depth);
  }
}

}  // namespace GTP_ISA
}  // namespace gtp
