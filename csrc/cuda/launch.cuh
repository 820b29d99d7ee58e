// Starting a kernel that takes one plain struct: a grid, a block, shared memory, a stream; every error has a text.
#pragma once

#include <cstdio>

#include "cuda/kernels.h"
#include "cuda/warp.cuh"

#ifndef GTP_EMULATE_CUDA
#include <cuda_runtime.h>
#endif

namespace gtp {
namespace cuda {

struct Launch {
  const char* kernel;
  int64_t blocks_x;
  int64_t blocks_y = 1;
  int threads = 256;
  size_t shared_bytes = 0;
};

inline bool failed_launch(const Launch& l, const char* reason, Error& error) {
  std::snprintf(error.text, sizeof error.text,
                "the CUDA kernel %s did not start (grid %lld x %lld, %d threads, %zu bytes of shared memory): %s",
                l.kernel, static_cast<long long>(l.blocks_x), static_cast<long long>(l.blocks_y), l.threads,
                l.shared_bytes, reason);
  return false;
}

// Queues kernel(params) on the stream; nothing is waited for. True, or false and the text.
template <class P>
bool launch(void (*kernel)(P), const P& params, const Launch& l, void* stream, Error& error) {
  if (l.blocks_x <= 0 || l.blocks_y <= 0) return true;
  if (l.blocks_x > 0x7fffffff || l.blocks_y > 0xffff) return failed_launch(l, "the grid is too large", error);
#ifdef GTP_EMULATE_CUDA
  (void)stream;
  emulated::run_grid(static_cast<unsigned>(l.blocks_x), static_cast<unsigned>(l.blocks_y), l.threads, l.shared_bytes,
                     [&] { kernel(params); });
  return true;
#else
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (l.shared_bytes > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(l.shared_bytes));
    if (status != cudaSuccess) {
      cudaGetLastError();
      return failed_launch(l, cudaGetErrorString(status), error);
    }
  }
  P copy = params;
  void* arguments[] = {&copy};
  const dim3 grid(static_cast<unsigned>(l.blocks_x), static_cast<unsigned>(l.blocks_y));
  const cudaError_t status = cudaLaunchKernel(function, grid, dim3(static_cast<unsigned>(l.threads)), arguments,
                                              l.shared_bytes, static_cast<cudaStream_t>(stream));
  if (status == cudaSuccess) return true;
  cudaGetLastError();  // not left for whoever asks next
  return failed_launch(l, cudaGetErrorString(status), error);
#endif
}

// What one block may have of shared memory on the current device, and how many multiprocessors there are.
struct Machine {
  int shared_bytes = 99 * 1024;
  int multiprocessors = 2;
};

inline bool machine(Machine& m, Error& error) {
#ifndef GTP_EMULATE_CUDA
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&m.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&m.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status != cudaSuccess) {
    cudaGetLastError();
    std::snprintf(error.text, sizeof error.text, "the CUDA device does not say what it is: %s",
                  cudaGetErrorString(status));
    return false;
  }
#endif
  (void)m;
  (void)error;
  return true;
}

}  // namespace cuda
}  // namespace gtp
