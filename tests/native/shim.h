// What the shims of the emulated CUDA kernels share: arrays as ctypes passes them, and the text of an error.
// Enumerations come as their numbers in params.h, an array as its address and a Rows as (address, type, stride_b,
// stride_n); 0 where there is none. Each function returns the text of an error, or null.
#pragma once

#include "params.h"

namespace {

struct RowsArgument {
  const void* data;
  int64_t dtype, stride_b, stride_n;
};
struct VectorArgument {
  const void* data;
  int64_t dtype;
};

[[maybe_unused]] gtp::Rows rows(const RowsArgument& r) {
  return {r.data, static_cast<gtp::DType>(r.dtype), r.stride_b, r.stride_n};
}
[[maybe_unused]] gtp::Vector vector(const VectorArgument& v) {
  return {v.data, static_cast<gtp::DType>(v.dtype)};
}

gtp::Error error;

const char* text(bool ok) {
  return ok ? nullptr : error.text;
}

}  // namespace
