// Rows of any floating type, read and written as float or double.
//
// load_row returns the source itself where it already has the type asked for, otherwise `buffer` with the converted
// values. store_row rounds to nearest even; NaN stays NaN. For loops that know the type at compile time there are
// vectors of float or double from and to arrays of any of the types: load and store_rounded. Same linkage rule as
// vec.h.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace gtp {
namespace GTP_ISA {

GTP_INLINE float from_bfloat16(uint16_t h) {
  return bits_as<float>(static_cast<uint32_t>(h) << 16);
}

GTP_INLINE uint16_t to_bfloat16(float f) {
  const uint32_t u = bits_as<uint32_t>(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Exact: a normal half is a shift of the exponent, a subnormal one a difference from 0.5.
GTP_INLINE float from_float16(uint16_t h) {
  const uint32_t w = static_cast<uint32_t>(h) << 16;
  const uint32_t twice = w + w;
  const float normal = bits_as<float>((twice >> 4) + 0x70000000u) * 0x1.0p-112f;
  const float subnormal = bits_as<float>((twice >> 17) | 0x3f000000u) - 0.5f;
  return bits_as<float>((w & 0x80000000u) |
                        (twice < 0x08000000u ? bits_as<uint32_t>(subnormal) : bits_as<uint32_t>(normal)));
}

// Rounds by adding a float whose last bit is the last bit of the half.
GTP_INLINE uint16_t to_float16(float f) {
  const uint32_t w = bits_as<uint32_t>(f);
  const uint32_t twice = w + w;
  float base = (bits_as<float>(w & 0x7fffffffu) * 0x1.0p+112f) * 0x1.0p-110f;
  uint32_t bias = twice & 0xff000000u;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  base = bits_as<float>((bias >> 1) + 0x07800000u) + base;
  const uint32_t bits = bits_as<uint32_t>(base);
  const uint32_t magnitude = ((bits >> 13) & 0x7c00u) + (bits & 0x0fffu);
  return static_cast<uint16_t>((w & 0x80000000u) >> 16 | (twice > 0xff000000u ? 0x7e00u : magnitude));
}

// Elements of the half types, for templates over the type of an array; Wide<T> is what T is computed in.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct Element {
  using Wide = float;
};
template <>
struct Element<double> {
  using Wide = double;
};
template <class T>
using Wide = typename Element<T>::Wide;

typedef uint16_t vhalf __attribute__((vector_size(GTP_VECTOR_BYTES / 2)));
typedef uint32_t vuint __attribute__((vector_size(GTP_VECTOR_BYTES)));

GTP_INLINE vfloat load(const BFloat16* p) {
#if defined(__AVX512BW__)
  // Each half goes to the upper half of its word in one permutation.
  const __m512i at = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 16);
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vfloat)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, at, _mm512_castsi256_si512(halves));
#elif defined(__AVX2__)
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
  vhalf halves;
  __builtin_memcpy(&halves, p, sizeof halves);
  return bits_as<vfloat>(__builtin_convertvector(halves, vuint) << 16);
#endif
}

GTP_INLINE vfloat load(const Float16* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  float lanes[Vec<float>::W];
  for (int i = 0; i < Vec<float>::W; ++i) lanes[i] = from_float16(p[i].bits);
  return load(lanes);
#endif
}

// Stores v rounded to the type of the array, and returns the rounded values.
GTP_INLINE vfloat store_rounded(float* p, vfloat v) {
  store(p, v);
  return v;
}

GTP_INLINE vdouble store_rounded(double* p, vdouble v) {
  store(p, v);
  return v;
}

GTP_INLINE vfloat store_rounded(BFloat16* p, vfloat v) {
#if defined(__AVX512BW__)
  const __m512i u = (__m512i)v;
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
  __m512i rounded = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
  const __m512i bits = _mm512_mask_and_epi32(_mm512_set1_epi32(0x7fc00000), number, rounded,
                                             _mm512_set1_epi32(static_cast<int32_t>(0xffff0000)));
  const __m512i upper =
      _mm512_castsi256_si512(_mm256_setr_epi16(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, bits)));
  return (vfloat)bits;
#else
  const vuint u = bits_as<vuint>(v);
  const vuint rounded = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
  const vuint bits = v == v ? rounded : vuint{} + 0x7fc00000u;
  const vhalf halves = __builtin_convertvector(bits >> 16, vhalf);
  __builtin_memcpy(p, &halves, sizeof halves);
  return bits_as<vfloat>(bits);
#endif
}

GTP_INLINE vfloat store_rounded(Float16* p, vfloat v) {
#if defined(__AVX512F__)
  const __m256i halves = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
  return (vfloat)_mm512_cvtph_ps(halves);
#elif defined(__F16C__)
  const __m128i halves = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
  return (vfloat)_mm256_cvtph_ps(halves);
#else
  float lanes[Vec<float>::W];
  store(lanes, v);
  for (int i = 0; i < Vec<float>::W; ++i) p[i].bits = to_float16(lanes[i]);
  return load(p);
#endif
}

// What a loop over the vectors of a row passes along: a whole vector, or the first `count` elements of one. Lanes
// beyond them are 0 when read.
struct Whole {};
struct Part {
  int64_t count;
};

template <class T>
GTP_INLINE typename Vec<Wide<T>>::V load(const T* p, Whole) {
  return load(p);
}

template <class T>
GTP_INLINE typename Vec<Wide<T>>::V load(const T* p, Part part) {
  T lanes[Vec<Wide<T>>::W] = {};
  for (int64_t i = 0; i < part.count; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class T>
GTP_INLINE typename Vec<T>::V splat(T value, Whole) {
  return splat(value);
}

template <class T>
GTP_INLINE typename Vec<T>::V splat(T value, Part part) {
  T lanes[Vec<T>::W] = {};
  for (int64_t i = 0; i < part.count; ++i) lanes[i] = value;
  return load(lanes);
}

template <class T>
GTP_INLINE typename Vec<Wide<T>>::V store_rounded(T* p, typename Vec<Wide<T>>::V v, Whole) {
  return store_rounded(p, v);
}

template <class T>
GTP_INLINE typename Vec<Wide<T>>::V store_rounded(T* p, typename Vec<Wide<T>>::V v, Part part) {
  T lanes[Vec<Wide<T>>::W];
  store_rounded(lanes, v);
  for (int64_t i = 0; i < part.count; ++i) p[i] = lanes[i];
  return load(p, part);
}

// f(c, part, i) for every vector of a row of `count` elements that begins at c. i, a constant once inlined, is the one
// of four sums that is this vector's, so that additions need not wait for each other.
template <class A, class F>
GTP_INLINE void sweep(int64_t count, F f) {
  constexpr int64_t W = Vec<A>::W;
  int64_t c = 0;
  for (; c + 4 * W <= count; c += 4 * W) {
    f(c, Whole{}, 0);
    f(c + W, Whole{}, 1);
    f(c + 2 * W, Whole{}, 2);
    f(c + 3 * W, Whole{}, 3);
  }
  for (; c + W <= count; c += W) f(c, Whole{}, 0);
  if (c < count) f(c, Part{count - c}, 0);
}

template <class A>
struct Sums {
  typename Vec<A>::V lanes[4] = {};
  GTP_INLINE_MEMBER A total() const {
    return reduce_sum<A>((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
  }
};

template <class A>
static void convert_half(const uint16_t* source, int64_t count, A* target) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    float lanes[8];
    _mm256_storeu_ps(lanes, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
    for (int j = 0; j < 8; ++j) target[i + j] = lanes[j];
  }
#endif
  for (; i < count; ++i) target[i] = from_float16(source[i]);
}

// `stride` counts elements; data + offset is the first.
template <class A>
static const A* load_row(const void* data, DType dtype, int64_t offset, int64_t stride, int64_t count, A* buffer) {
  switch (dtype) {
    case DType::Float32: {
      const float* row = static_cast<const float*>(data) + offset;
      if constexpr (sizeof(A) == sizeof(float)) {
        if (stride == 1) return row;
      }
      if (stride == 1) {
        for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<A>(row[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<A>(row[i * stride]);
      }
      break;
    }
    case DType::Float64: {
      const double* row = static_cast<const double*>(data) + offset;
      if constexpr (sizeof(A) == sizeof(double)) {
        if (stride == 1) return row;
      }
      for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<A>(row[i * stride]);
      break;
    }
    case DType::BFloat16: {
      const uint16_t* row = static_cast<const uint16_t*>(data) + offset;
      if (stride == 1) {
        for (int64_t i = 0; i < count; ++i) buffer[i] = from_bfloat16(row[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) buffer[i] = from_bfloat16(row[i * stride]);
      }
      break;
    }
    case DType::Float16: {
      const uint16_t* row = static_cast<const uint16_t*>(data) + offset;
      if (stride == 1) {
        convert_half(row, count, buffer);
      } else {
        for (int64_t i = 0; i < count; ++i) buffer[i] = from_float16(row[i * stride]);
      }
      break;
    }
  }
  return buffer;
}

template <class A>
static const A* load_row(const Rows& rows, int64_t b, int64_t n, int64_t count, A* buffer) {
  return load_row(rows.data, rows.dtype, b * rows.stride_b + n * rows.stride_n, 1, count, buffer);
}

template <class A>
static const A* load_row(const Vector& vector, int64_t count, A* buffer) {
  return load_row(vector.data, vector.dtype, 0, 1, count, buffer);
}

template <class A>
static void store_row(const A* source, void* data, DType dtype, int64_t offset, int64_t count) {
  switch (dtype) {
    case DType::Float32: {
      float* row = static_cast<float*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) row[i] = static_cast<float>(source[i]);
      break;
    }
    case DType::Float64: {
      double* row = static_cast<double*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) row[i] = static_cast<double>(source[i]);
      break;
    }
    case DType::BFloat16: {
      uint16_t* row = static_cast<uint16_t*>(data) + offset;
      int64_t i = 0;
#if defined(__AVX512BF16__)
      if constexpr (sizeof(A) == 4) {
        // The instruction takes subnormal values for zero: a vector with one goes the long way, and all after it.
        for (; i + 16 <= count; i += 16) {
          const __m512 v = _mm512_loadu_ps(source + i);
          if (_mm512_fpclass_ps_mask(v, 0x20)) break;
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + i), (__m256i)_mm512_cvtneps_pbh(v));
        }
      }
#endif
      for (; i < count; ++i) row[i] = to_bfloat16(static_cast<float>(source[i]));
      break;
    }
    case DType::Float16: {
      uint16_t* row = static_cast<uint16_t*>(data) + offset;
      int64_t i = 0;
#if defined(__F16C__)
      for (; i + 8 <= count; i += 8) {
        float lanes[8];
        for (int j = 0; j < 8; ++j) lanes[j] = static_cast<float>(source[i + j]);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(row + i), _mm256_cvtps_ph(_mm256_loadu_ps(lanes), 0));
      }
#endif
      for (; i < count; ++i) row[i] = to_float16(static_cast<float>(source[i]));
      break;
    }
  }
}

GTP_INLINE double load_scalar(const Vector& vector, int64_t i) {
  return vector.dtype == DType::Float64 ? static_cast<const double*>(vector.data)[i]
                                        : static_cast<double>(static_cast<const float*>(vector.data)[i]);
}

GTP_INLINE void store_scalar(double value, void* data, DType dtype, int64_t i) {
  if (dtype == DType::Float64) {
    static_cast<double*>(data)[i] = value;
  } else {
    static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

}  // namespace GTP_ISA
}  // namespace gtp
