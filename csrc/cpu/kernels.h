// The CPU kernels and what they add to params.h.
//
// - Index values, token maps and CSR contents are checked here; a bad one sets `error` and returns false.
// - The result depends neither on the number of threads nor on how the ranges handed to `Parallel` are cut, but it may
//   differ in the last bits between instruction sets.
#pragma once

#include "params.h"

namespace gtp {

// Runs body(context, begin, end) over ranges that partition [0, count), on one thread or several.
struct Parallel {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*run)(int64_t count, int64_t grain, Body body, void* context);
};

template <class F>
GTP_FORCE_INLINE void parallel_for(const Parallel& parallel, int64_t count, int64_t grain, F& body) {
  if (count <= 0) return;
  parallel.run(
      count, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); }, &body);
}

GTP_API void token_importance(const ImportanceParams&, const Parallel&);
GTP_API void select_tokens(const SelectParams&, const Parallel&);
GTP_API bool live_graph(const LiveGraphParams&, const Parallel&, Error& error);

// The kernels that are compiled once per instruction set.
struct Kernels {
  const char* isa;
  void (*attention)(const AttentionParams&, const Parallel&);
  void (*attention_backward)(const AttentionBackwardParams&, const Parallel&);
  bool (*propagate)(const PropagateParams&, const Parallel&, Error& error);
  bool (*propagate_backward)(const PropagateBackwardParams&, const Parallel&, Error& error);
  bool (*propagate_dense)(const PropagateDenseParams&, const Parallel&, Error& error);
  void (*build_graph)(const GraphParams&, const Parallel&);
  bool (*live_select)(const LiveSelectParams&, const Parallel&, Error& error);
};

// The best set that this machine runs, or the one that GTP_KERNELS_ISA names. Throws std::runtime_error for a name that
// is unknown, not compiled in, or beyond the machine.
GTP_API const Kernels& kernels();
GTP_API const Kernels& kernels_for(const char* isa);
// The i-th compiled set, worst first, or nullptr; `runs` says whether this machine can run it.
GTP_API const char* isa_name(int i, bool* runs);

}  // namespace gtp
