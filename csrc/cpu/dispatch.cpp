#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "scratch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(GTP_HAVE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gtp {

#define GTP_DECLARE_KERNELS(isa)                                                    \
  namespace isa {                                                                   \
  void attention(const AttentionParams&, const Parallel&);                          \
  void attention_backward(const AttentionBackwardParams&, const Parallel&);         \
  bool propagate(const PropagateParams&, const Parallel&, Error&);                  \
  bool propagate_backward(const PropagateBackwardParams&, const Parallel&, Error&); \
  bool propagate_dense(const PropagateDenseParams&, const Parallel&, Error&);       \
  void build_graph(const GraphParams&, const Parallel&);                            \
  bool live_select(const LiveSelectParams&, const Parallel&, Error&);               \
  }
#define GTP_KERNEL_TABLE(isa) \
  {#isa,                      \
   isa::attention,            \
   isa::attention_backward,   \
   isa::propagate,            \
   isa::propagate_backward,   \
   isa::propagate_dense,      \
   isa::build_graph,          \
   isa::live_select}

GTP_DECLARE_KERNELS(baseline)
#if defined(GTP_HAVE_X86)
GTP_DECLARE_KERNELS(avx2)
GTP_DECLARE_KERNELS(avx512)
#define GTP_DECLARE_ATTENTION(isa)                                          \
  namespace isa {                                                           \
  void attention(const AttentionParams&, const Parallel&);                  \
  void attention_backward(const AttentionBackwardParams&, const Parallel&); \
  }
// The attention of one set, everything else that of AVX-512.
#define GTP_ATTENTION_TABLE(isa) \
  {#isa,                         \
   isa::attention,               \
   isa::attention_backward,      \
   avx512::propagate,            \
   avx512::propagate_backward,   \
   avx512::propagate_dense,      \
   avx512::build_graph,          \
   avx512::live_select}
GTP_DECLARE_ATTENTION(avx512_bf16)
#if defined(GTP_HAVE_AMX)
GTP_DECLARE_ATTENTION(amx)
#endif
#if defined(GTP_EMULATE_AMX)
GTP_DECLARE_ATTENTION(amx_emulated)
#endif
#endif

namespace {

const Kernels kTables[] = {
    GTP_KERNEL_TABLE(baseline),
#if defined(GTP_HAVE_X86)
    GTP_KERNEL_TABLE(avx2),
    GTP_KERNEL_TABLE(avx512),
    GTP_ATTENTION_TABLE(avx512_bf16),
#if defined(GTP_HAVE_AMX)
    GTP_ATTENTION_TABLE(amx),
#endif
#if defined(GTP_EMULATE_AMX)
    GTP_ATTENTION_TABLE(amx_emulated),
#endif
#endif
};
constexpr int kCount = sizeof(kTables) / sizeof(kTables[0]);

#if defined(GTP_HAVE_AMX)
// The kernel hands the tiles to a process that asks for them; what uses them without asking is killed.
bool machine_has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (kBfloat16 | kTiles)) != (kBfloat16 | kTiles)) {
    return false;
  }
  constexpr long kRequest = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}
#elif defined(GTP_HAVE_X86)
bool machine_has_amx() {
  return false;
}
#endif

bool machine_runs(const char* isa) {
#if defined(GTP_HAVE_X86)
  __builtin_cpu_init();
  if (!std::strcmp(isa, "avx2")) {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
  if (!std::strcmp(isa, "avx512")) {
    return machine_runs("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (!std::strcmp(isa, "avx512_bf16") || !std::strcmp(isa, "amx_emulated")) {
    return machine_runs("avx512") && __builtin_cpu_supports("avx512bf16");
  }
  if (!std::strcmp(isa, "amx")) return machine_runs("avx512_bf16") && machine_has_amx();
#endif
  return !std::strcmp(isa, "baseline");
}

const Kernels& choose() {
  const char* forced = std::getenv("GTP_KERNELS_ISA");
  if (forced && *forced) return kernels_for(forced);
  int best = 0;
  for (int i = 1; i < kCount; ++i) {
    const bool emulated = !std::strcmp(kTables[i].isa, "amx_emulated");  // for tests, when it is asked for
    if (!emulated && machine_runs(kTables[i].isa)) best = i;
  }
  return kTables[best];
}

struct Block {
  char* data = nullptr;
  size_t size = 0;
  ~Block() {
    std::free(data);
  }
  void reset() {
    std::free(data);
    data = nullptr;
    size = 0;
  }
};
thread_local Block block;
constexpr size_t kKeep = size_t{64} << 20;

}  // namespace

const char* isa_name(int i, bool* runs) {
  if (i < 0 || i >= kCount) return nullptr;
  if (runs) *runs = machine_runs(kTables[i].isa);
  return kTables[i].isa;
}

const Kernels& kernels_for(const char* isa) {
  std::string known;
  for (const Kernels& table : kTables) {
    if (!std::strcmp(table.isa, isa)) {
      if (!machine_runs(isa)) {
        throw std::runtime_error(std::string("GTP_KERNELS_ISA: this machine does not run '") + isa + "'");
      }
      return table;
    }
    known += (known.empty() ? "'" : ", '") + std::string(table.isa) + "'";
  }
  throw std::runtime_error(std::string("GTP_KERNELS_ISA is '") + isa + "'; this build has " + known);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

int64_t graph_neighbours(int64_t count, int64_t asked, int64_t prefix, bool paper) {
  const int64_t wanted = !paper && prefix == 0 ? asked + 1 : asked;
  return wanted < count ? wanted : count > 0 ? count - 1 : 0;
}

int64_t graph_capacity(int64_t height, int64_t width, GraphType type, int64_t neighbours) {
  const int64_t n = height * width;
  const int64_t grid = n > 0 ? 2 * (height * (width - 1) + width * (height - 1) + 2 * (height - 1) * (width - 1)) : 0;
  if (type == GraphType::Spatial) return grid;
  if (type == GraphType::Semantic) return n * neighbours;
  return grid + n * neighbours < n * (n - 1) ? grid + n * neighbours : n * (n - 1);
}

char* scratch_acquire(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  block.reset();  // nothing of the last call, and no room beyond what is asked for
#endif
  if (bytes > block.size) {
    block.reset();
    const size_t size = (bytes + 4095) / 4096 * 4096;
    block.data = static_cast<char*>(std::aligned_alloc(64, size));
    if (!block.data) throw std::bad_alloc();
    block.size = size;
  }
  return block.data;
}

void scratch_release() {
  if (block.size > kKeep) block.reset();
}

}  // namespace gtp
