// Scratch memory of a thread: kept between calls, so that no kernel allocates in its steady state.
//
// A Scratch is one 64-byte aligned block carved up by take(); every piece starts on 64 bytes. At most one Scratch is
// alive per thread at a time. The block is not cleared. What a thread holds beyond 64 MiB is freed with the Scratch.
// Throws std::bad_alloc.
#pragma once

#include "kernels.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace gtp {

char* scratch_acquire(size_t bytes);
void scratch_release();

class Scratch {
 public:
  GTP_FORCE_INLINE explicit Scratch(size_t bytes) : cursor_(scratch_acquire(bytes)) {}
  GTP_FORCE_INLINE ~Scratch() {
    scratch_release();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // What take<T>(count) uses of the block.
  template <class T>
  static GTP_FORCE_INLINE size_t bytes(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64 + kRedZone;
  }
  template <class T>
  GTP_FORCE_INLINE T* take(int64_t count) {
    char* piece = cursor_;
    cursor_ += bytes<T>(count);
#if defined(__SANITIZE_ADDRESS__)
    char* end = piece + static_cast<size_t>(count) * sizeof(T);
    ASAN_POISON_MEMORY_REGION(end, static_cast<size_t>(cursor_ - end));
#endif
    return reinterpret_cast<T*>(piece);
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kRedZone = 64;
#else
  static constexpr size_t kRedZone = 0;
#endif
  char* cursor_;
};

}  // namespace gtp
