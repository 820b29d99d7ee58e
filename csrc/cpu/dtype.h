// Rows of any floating type, read and written as float or double.
//
// load_row returns the source itself where it already has the type asked for, otherwise `buffer` with the converted
// values. store_row rounds to nearest even; NaN stays NaN. Same linkage rule as vec.h.
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
      for (int64_t i = 0; i < count; ++i) row[i] = to_bfloat16(static_cast<float>(source[i]));
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

}  // namespace GTP_ISA
}  // namespace gtp
