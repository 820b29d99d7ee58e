// The one matrix product of this package: C[rows, panel] = A[rows, depth] * packed panel, accumulated in registers.
//
// The right-hand side is packed as panels of 1 to kPanel vectors: element (k, column) of panel p is
// base(p) + k * width(p) + column, all panels of a matrix back to back, padded with zeros to whole vectors.
// The left-hand side is read in place: element (i, k) is a[i * lda + k].
// The operands are float or double, or pairs of bfloat16 values where the machine multiplies those.
// Every element of C is one chain of multiply-adds over rising k, whatever the tile: equal rows give equal bits.
#pragma once

#include "vec.h"
#if defined(__AMX_BF16__) || defined(GTP_EMULATE_AMX)
#define GTP_AMX
#include "amx.h"
#endif

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

// How `vectors` columns of vectors are cut into panels of up to `widest`, as equal as can be.
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t vectors_, int64_t widest = kPanel)
      : vectors(vectors_), count((vectors_ + widest - 1) / widest) {}
  int64_t width(int64_t p) const {
    return vectors / count + (p < vectors % count);
  }
  int64_t start(int64_t p) const {
    const int64_t extra = vectors % count;
    return p * (vectors / count) + (p < extra ? p : extra);
  }
};

// What the product needs of the type E that its operands are packed in.
template <class E>
struct Operand {
  using Result = E;
  static constexpr int kBlock = kRows;      // rows of the left-hand side that are multiplied at a time
  static constexpr int kWidest = kPanel;    // vectors of a panel of the right-hand side
  static constexpr bool kAnywhere = false;  // whether pairs of the left-hand side may lie at any address
  using V = typename Vec<E>::V;
  static GTP_INLINE_MEMBER V broadcast(E x) {
    return splat(x);
  }
  static GTP_INLINE_MEMBER V multiply_add(V sum, V a, V b) {
    return sum + a * b;
  }
};

#if defined(__AVX512BF16__)
// Two bfloat16 values that follow each other in depth: element (k, column) holds the values 2 k and 2 k + 1, and one
// instruction adds both products to a float32.
enum class Pair : uint32_t {};

template <>
struct Vec<Pair> {
  using V = vint;
  static constexpr int W = 16;
  static constexpr bool is_floating = false;
};

template <>
struct Operand<Pair> {
  using Result = float;
#if defined(GTP_AMX)
  static constexpr int kBlock = 16, kWidest = 4;
  static constexpr bool kAnywhere = true;
#else
  static constexpr int kBlock = kRows, kWidest = kPanel;
  static constexpr bool kAnywhere = false;
#endif
  using V = vint;
  static GTP_INLINE_MEMBER V broadcast(Pair x) {
    return splat_bits(static_cast<int32_t>(x));
  }
  static GTP_INLINE_MEMBER vfloat multiply_add(vfloat sum, V a, V b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// How the left-hand side lies in memory: element (i, k) is a[i * lda + k], or a[k * lda + i].
enum class Left { Rows, Columns };

// finish(row, column, values) takes an array of vectors of C, from the column of the first.
template <Left LEFT, class E, int ROWS, int VECTORS, class Finish>
GTP_INLINE void multiply_tile(int64_t depth, const E* a, int64_t lda, const E* panel, int64_t row, int64_t column,
                              const Finish& finish) {
  using T = typename Operand<E>::Result;
  using V = typename Vec<T>::V;
  constexpr int W = Vec<T>::W;
  V sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = V{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    typename Operand<E>::V b[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) b[j] = load(panel + k * (VECTORS * W) + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const auto x = Operand<E>::broadcast(LEFT == Left::Rows ? a[i * lda + k] : a[k * lda + i]);
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = Operand<E>::multiply_add(sum[i][j], x, b[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    finish(row + i, column, sum[i]);
  }
}

template <Left LEFT, class E, int ROWS, class Finish>
static void multiply_rows(int64_t depth, const E* a, int64_t lda, const E* packed, const Panels& panels, int64_t row,
                          const Finish& finish) {
  constexpr int W = Vec<E>::W;
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t start = panels.start(p) * W;
    const E* panel = packed + start * depth;
    switch (panels.width(p)) {
      case 1:
        multiply_tile<LEFT, E, ROWS, 1>(depth, a, lda, panel, row, start, finish);
        break;
      case 2:
        multiply_tile<LEFT, E, ROWS, 2>(depth, a, lda, panel, row, start, finish);
        break;
      default:
        multiply_tile<LEFT, E, ROWS, kPanel>(depth, a, lda, panel, row, start, finish);
    }
  }
}

// C[rows, panels.vectors * W], handed to finish(), for up to Operand<E>::kBlock rows; fewer go one by one.
template <class E, class Finish>
static void multiply(int64_t rows, int64_t depth, const E* a, int64_t lda, const E* packed, const Panels& panels,
                     const Finish& finish) {
#if defined(GTP_AMX)
  if constexpr (!Vec<E>::is_floating) {
    tile_configure(rows, depth % 16);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t start = panels.start(p) * 16;
      const E* panel = packed + start * depth;
      switch (panels.width(p)) {
        case 1:
          multiply_amx<1>(rows, depth, a, lda, panel, start, finish);
          break;
        case 2:
          multiply_amx<2>(rows, depth, a, lda, panel, start, finish);
          break;
        case 3:
          multiply_amx<3>(rows, depth, a, lda, panel, start, finish);
          break;
        default:
          multiply_amx<Operand<E>::kWidest>(rows, depth, a, lda, panel, start, finish);
      }
    }
    return;
  }
#endif
  if (rows == kRows) {
    multiply_rows<Left::Rows, E, kRows>(depth, a, lda, packed, panels, 0, finish);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      multiply_rows<Left::Rows, E, 1>(depth, a + i * lda, lda, packed, panels, i, finish);
    }
  }
}

// C += A^T B, where element (k, i) of A is a[k * lda + i] and is read for i up to the next multiple of kRows; as many
// rows of c are written.
template <class T>
static void accumulate_transposed(int64_t rows, int64_t depth, const T* a, int64_t lda, const T* packed,
                                  const Panels& panels, T* c, int64_t ldc) {
  for (int64_t i = 0; i < rows; i += kRows) {
    multiply_rows<Left::Columns, T, kRows>(depth, a + i, lda, packed, panels, i,
                                           [=](int64_t row, int64_t j, const auto& values) {
                                             for (const auto& value : values) {
                                               store(c + row * ldc + j, load(c + row * ldc + j) + value);
                                               j += Vec<T>::W;
                                             }
                                           });
  }
}

// C = A B, written to c; ldc >= panels.vectors * W.
template <class E, class T>
static void multiply(int64_t rows, int64_t depth, const E* a, int64_t lda, const E* packed, const Panels& panels, T* c,
                     int64_t ldc) {
  multiply(rows, depth, a, lda, packed, panels, [=](int64_t i, int64_t j, const auto& values) {
    for (const auto& value : values) {
      store(c + i * ldc + j, value);
      j += Vec<T>::W;
    }
  });
}

#if !defined(__AVX512F__)
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
#endif

#if defined(__AVX512F__)
// Elements k to k + 15 of up to 16 rows of 32-bit values, transposed; the rows beyond `count` count as zeros.
template <class E>
GTP_INLINE void transpose16(const E* const* rows, int64_t count, int64_t k, E* target, int64_t stride) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = i < count ? _mm512_loadu_ps(rows[i] + k) : _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  // r[4 g + e]: in its 128-bit lane l the elements 4 l + e of the rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int g = 0; g < 16; g += 4) {
    r[g] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[g]), _mm512_castps_pd(t[g + 2])));
    r[g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[g]), _mm512_castps_pd(t[g + 2])));
    r[g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[g + 1]), _mm512_castps_pd(t[g + 3])));
    r[g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[g + 1]), _mm512_castps_pd(t[g + 3])));
  }
#pragma GCC unroll 4
  for (int e = 0; e < 4; ++e) {
    const __m512 low = _mm512_shuffle_f32x4(r[e], r[4 + e], 0x44), high = _mm512_shuffle_f32x4(r[e], r[4 + e], 0xee);
    const __m512 low2 = _mm512_shuffle_f32x4(r[8 + e], r[12 + e], 0x44);
    const __m512 high2 = _mm512_shuffle_f32x4(r[8 + e], r[12 + e], 0xee);
    _mm512_storeu_ps(target + e * stride, _mm512_shuffle_f32x4(low, low2, 0x88));
    _mm512_storeu_ps(target + (4 + e) * stride, _mm512_shuffle_f32x4(low, low2, 0xdd));
    _mm512_storeu_ps(target + (8 + e) * stride, _mm512_shuffle_f32x4(high, high2, 0x88));
    _mm512_storeu_ps(target + (12 + e) * stride, _mm512_shuffle_f32x4(high, high2, 0xdd));
  }
}
constexpr int kPackRows = 16;
#else
constexpr int kPackRows = 4;
#endif

// One panel of the transpose: element (k, column) = row(column)[k], zero for the columns beyond `count`.
// row(column, slot) gives a pointer to `depth` values that stays valid until the slot (0 to kPackRows - 1) is asked
// for again. `width` is a multiple of 4, and of 16 where a vector holds 16 values of E.
template <class E, class Row>
static void pack_transposed(int64_t depth, int64_t first, int64_t count, int64_t width, Row row, E* panel) {
  for (int64_t column = 0; column < width; column += kPackRows) {
    const int64_t lanes = width - column < kPackRows ? width - column : kPackRows;
    const int64_t left = count - first - column;
    const int64_t valid = left < 0 ? 0 : left < lanes ? left : lanes;
    const E* rows[kPackRows];
    for (int64_t i = 0; i < valid; ++i) rows[i] = row(first + column + i, static_cast<int>(i));
    int64_t k = 0;
    if constexpr (sizeof(E) == 4) {
#if defined(__AVX512F__)
      for (; k + 16 <= depth; k += 16) transpose16(rows, valid, k, panel + k * width + column, width);
#else
      if (valid == 4) {
        for (; k + 4 <= depth; k += 4) transpose4(rows, k, panel + k * width + column, width);
      }
#endif
    }
    for (; k < depth; ++k) {
      for (int64_t i = 0; i < lanes; ++i) panel[k * width + column + i] = i < valid ? rows[i][k] : E(0);
    }
  }
}

// All panels of `count` rows of `depth` values, transposed.
template <class E, class Row>
static void pack_transposed_all(int64_t depth, int64_t count, const Panels& panels, Row row, E* packed) {
  constexpr int W = Vec<E>::W;
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t first = panels.start(p) * W;
    pack_transposed(depth, first, count, panels.width(p) * W, row, packed + first * depth);
  }
}

}  // namespace GTP_ISA
}  // namespace gtp
