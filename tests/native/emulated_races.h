// A race detector for the emulated GPU: what compute-sanitizer's racecheck and synccheck look for, without a GPU.
//
// A library that is compiled with -fsanitize=thread and GTP_EMULATED_RACES, and linked without GCC's own run-time
// library, calls the __tsan_* functions below at every access to memory. Of every byte the last read, write and
// atomic change are kept. Two accesses by different threads, one of which writes, are ordered
//   in one warp     by sync_warp or sync_block between them
//   in one block    by sync_block
//   in one launch   by nothing
// and otherwise a race, unless both are atomic. Shuffles, votes and products order no memory, as in CUDA. A copy_async
// owns its target from its start until it is waited for, which its thread does before it ends. Shared memory that a
// block reads it has written before, and none lies beyond what the launch asked for.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <unordered_map>
#include <vector>

namespace gtp {
namespace emulated {

enum class Access : uint8_t { None, Read, Write, Atomic };

}  // namespace emulated
}  // namespace gtp

#ifndef GTP_EMULATED_RACES

namespace gtp {
namespace emulated {

struct Races {
  void begin_launch() {}
  void begin_block(const void*, size_t) {}
  void begin_turn(unsigned, uint32_t, uint32_t, const void*, size_t) {}
  void end_turn() {}
  void access(const void*, size_t, Access) {}
  void begin_copy(const void*, const void*, bool) {}
  void end_copy(const void*) {}
};
inline Races races() {
  return {};
}

}  // namespace emulated
}  // namespace gtp

#else

#define GTP_UNTRACKED __attribute__((no_sanitize("thread"), noinline))

namespace gtp {
namespace emulated {

// Who has accessed a byte: the last one, and whether others did so beside it.
struct Footprint {
  uint32_t block = 0, barrier = 0, warp_barrier = 0;  // the block of all launches; how many barriers it had met
  uint16_t thread = 0;
  Access kind = Access::None;
  bool other_threads = false, other_warps = false, other_blocks = false;
};
struct Cell {
  Footprint read, write, atomic;
  bool copying = false;
};

class Races {
 public:
  GTP_UNTRACKED void begin_launch() {
    first_ = now_.block + 1;
    last_page_ = 0;
    pages_.clear();
  }
  GTP_UNTRACKED void begin_block(const void* shared, size_t bytes) {
    ++now_.block;
    shared_ = static_cast<const unsigned char*>(shared);
    shared_end_ = shared_ + bytes;
  }
  // From here on a thread runs, until end_turn: it has met so many barriers of the block and of its warp.
  GTP_UNTRACKED void begin_turn(unsigned thread, uint32_t barrier, uint32_t warp_barrier, const void* stack,
                                size_t bytes) {
    now_.thread = static_cast<uint16_t>(thread);
    now_.barrier = barrier;
    now_.warp_barrier = warp_barrier;
    stack_ = static_cast<const unsigned char*>(stack);
    stack_end_ = stack_ + bytes;
    active_ = true;
  }
  GTP_UNTRACKED void end_turn() {
    active_ = false;
  }

  GTP_UNTRACKED void access(const void* address, size_t bytes, Access kind) {
    const unsigned char* const begin = static_cast<const unsigned char*>(address);
    if (!active_ || (begin >= stack_ && begin < stack_end_)) return;
    active_ = false;
    for (size_t i = 0; i < bytes; ++i) one(begin + i, kind);
    active_ = true;
  }
  GTP_UNTRACKED void begin_copy(const void* target, const void* source, bool valid) {
    if (valid) access(source, 16, Access::Read);
    access(target, 16, Access::Write);
    set_copying(target, true);
  }
  GTP_UNTRACKED void end_copy(const void* target) {
    set_copying(target, false);
    access(target, 16, Access::Write);
  }

 private:
  GTP_UNTRACKED void one(const unsigned char* byte, Access kind) {
    if (byte >= shared_end_ && byte < shared_end_ + kGuard) {
      fail(byte, kind, "which is beyond the shared memory of its block", now_);
    }
    Cell& cell = cell_of(byte);
    if (cell.copying) fail(byte, kind, "while an asynchronous copy to it is on its way", cell.write);
    if (is_shared(byte)) {
      for (Footprint* of : {&cell.read, &cell.write, &cell.atomic}) {
        if (of->block != now_.block) *of = {};  // what blocks before this one left there is gone
      }
      if (kind != Access::Write && cell.write.kind == Access::None) {
        fail(byte, kind, "which the block has not written", cell.write);
      }
    }
    if (conflicts(cell.write)) {
      fail(byte, kind, "which another thread writes with nothing to order the two", cell.write);
    }
    if (kind != Access::Read && conflicts(cell.read)) {
      fail(byte, kind, "which another thread reads with nothing to order the two", cell.read);
    }
    if (kind != Access::Atomic && conflicts(cell.atomic)) {
      fail(byte, kind, "which another thread changes atomically with nothing to order the two", cell.atomic);
    }
    leave(kind == Access::Read ? cell.read : kind == Access::Write ? cell.write : cell.atomic, kind);
  }

  GTP_UNTRACKED bool is_shared(const unsigned char* byte) const {
    return byte >= shared_ && byte < shared_end_;
  }
  // Whether what was there before is of another thread, and nothing orders it before the one that runs.
  GTP_UNTRACKED bool conflicts(const Footprint& before) const {
    if (before.kind == Access::None) return false;
    if (before.block != now_.block || before.other_blocks) return true;
    if (before.barrier != now_.barrier) return false;
    if (before.thread / 32 != now_.thread / 32 || before.other_warps) return true;
    if (before.warp_barrier != now_.warp_barrier) return false;
    return before.thread != now_.thread || before.other_threads;
  }
  GTP_UNTRACKED void leave(Footprint& there, Access kind) const {
    Footprint next = now_;
    next.kind = kind;
    if (there.kind != Access::None) {
      const bool same_block = there.block == now_.block, same = same_block && there.barrier == now_.barrier;
      const bool same_warp = there.thread / 32 == now_.thread / 32;
      next.other_blocks = there.other_blocks || !same_block;
      next.other_warps = same && (there.other_warps || !same_warp);
      next.other_threads = same && same_warp && there.warp_barrier == now_.warp_barrier &&
                           (there.other_threads || there.thread != now_.thread);
    }
    there = next;
  }

  GTP_UNTRACKED void set_copying(const void* target, bool copying) {
    const bool was = active_;
    active_ = false;
    for (int i = 0; i < 16; ++i) cell_of(static_cast<const unsigned char*>(target) + i).copying = copying;
    active_ = was;
  }
  GTP_UNTRACKED Cell& cell_of(const unsigned char* byte) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(byte), page = at / kPage;
    if (page != last_page_) {
      std::vector<Cell>& cells = pages_[page];
      if (cells.empty()) cells.resize(kPage);
      last_page_ = page;
      last_ = cells.data();
    }
    return last_[at % kPage];
  }

  [[noreturn]] GTP_UNTRACKED void fail(const unsigned char* byte, Access kind, const char* why,
                                       const Footprint& other) const {
    static const char* const names[] = {"none", "reads", "writes", "changes atomically"};
    std::fprintf(stderr, "emulated GPU: thread %u of block %u %s ", now_.thread, now_.block - first_,
                 names[static_cast<int>(kind)]);
    if (is_shared(byte)) {
      std::fprintf(stderr, "byte %td of shared memory", byte - shared_);
    } else {
      std::fprintf(stderr, "a byte at %p", static_cast<const void*>(byte));
    }
    std::fprintf(stderr, ", %s (thread %u)\n", why, other.thread);
    std::abort();
  }

  bool active_ = false;  // whether a thread of the GPU runs, and not the emulation
  Footprint now_;
  const unsigned char *shared_ = nullptr, *shared_end_ = nullptr, *stack_ = nullptr, *stack_end_ = nullptr;
  static constexpr size_t kPage = 4096;
  static constexpr uint64_t kGuard = 4096;  // what the emulated GPU keeps free behind shared memory
  uint32_t first_ = 1;                      // block of this launch, for messages
  uintptr_t last_page_ = 0;
  Cell* last_ = nullptr;
  std::unordered_map<uintptr_t, std::vector<Cell> > pages_;
};

// Not a static variable of races(), whose making would call it.
inline Races the_races;
inline Races& races() {
  return the_races;
}

}  // namespace emulated
}  // namespace gtp

#define GTP_TRACKED_ACCESS(bytes)                                           \
  GTP_UNTRACKED void __tsan_read##bytes(void* at) {                         \
    gtp::emulated::races().access(at, bytes, gtp::emulated::Access::Read);  \
  }                                                                         \
  GTP_UNTRACKED void __tsan_write##bytes(void* at) {                        \
    gtp::emulated::races().access(at, bytes, gtp::emulated::Access::Write); \
  }                                                                         \
  GTP_UNTRACKED void __tsan_unaligned_read##bytes(void* at) {               \
    gtp::emulated::races().access(at, bytes, gtp::emulated::Access::Read);  \
  }                                                                         \
  GTP_UNTRACKED void __tsan_unaligned_write##bytes(void* at) {              \
    gtp::emulated::races().access(at, bytes, gtp::emulated::Access::Write); \
  }

extern "C" {
GTP_TRACKED_ACCESS(1)
GTP_TRACKED_ACCESS(2)
GTP_TRACKED_ACCESS(4)
GTP_TRACKED_ACCESS(8)
GTP_TRACKED_ACCESS(16)
GTP_UNTRACKED void __tsan_read_range(void* at, long bytes) {
  gtp::emulated::races().access(at, static_cast<size_t>(bytes), gtp::emulated::Access::Read);
}
GTP_UNTRACKED void __tsan_write_range(void* at, long bytes) {
  gtp::emulated::races().access(at, static_cast<size_t>(bytes), gtp::emulated::Access::Write);
}
GTP_UNTRACKED void __tsan_init() {}
GTP_UNTRACKED void __tsan_func_entry(void*) {}
GTP_UNTRACKED void __tsan_func_exit() {}
GTP_UNTRACKED void __tsan_vptr_update(void**, void*) {}
GTP_UNTRACKED void __tsan_vptr_read(void**) {}
// Copies and fills that stay calls: -Wl,--wrap gives them to these.
void* __real_memcpy(void* to, const void* from, size_t bytes);
void* __real_memmove(void* to, const void* from, size_t bytes);
void* __real_memset(void* to, int value, size_t bytes);
GTP_UNTRACKED void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  gtp::emulated::races().access(from, bytes, gtp::emulated::Access::Read);
  gtp::emulated::races().access(to, bytes, gtp::emulated::Access::Write);
  return __real_memcpy(to, from, bytes);
}
GTP_UNTRACKED void* __wrap_memmove(void* to, const void* from, size_t bytes) {
  gtp::emulated::races().access(from, bytes, gtp::emulated::Access::Read);
  gtp::emulated::races().access(to, bytes, gtp::emulated::Access::Write);
  return __real_memmove(to, from, bytes);
}
GTP_UNTRACKED void* __wrap_memset(void* to, int value, size_t bytes) {
  gtp::emulated::races().access(to, bytes, gtp::emulated::Access::Write);
  return __real_memset(to, value, bytes);
}
// The host's own: guards of static variables.
GTP_UNTRACKED unsigned char __tsan_atomic8_load(const volatile unsigned char* at, int) {
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}
}

#endif  // GTP_EMULATED_RACES
