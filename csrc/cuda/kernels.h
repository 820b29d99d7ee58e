// The CUDA kernels and what they add to params.h.
//
// - Pointers are of device memory, of the current device; everything is queued on `stream` and nothing is waited for.
// - A launch that fails sets `error` and returns false.
// - Index values, token maps and CSR contents cannot be checked without waiting: a bad one makes a wrong result, but
//   nothing is read or written outside the arrays.
// - The result does not depend on the run: no floating-point atomics.
#pragma once

#include "params.h"

namespace gtp {
namespace cuda {

// Bytes of device memory, aligned to 16, that a call needs beside its inputs and outputs; it may hold anything.
size_t attention_workspace(const AttentionParams&);
size_t build_graph_workspace(const GraphParams&);

// BFloat16 and Float16, head sizes up to 128; token_scales Float32.
bool attention(const AttentionParams&, void* workspace, void* stream, Error& error);

// Float32.
bool token_importance(const ImportanceParams&, void* stream, Error& error);
bool select_tokens(const SelectParams&, void* stream, Error& error);

// Float32, BFloat16 and Float16.
bool propagate(const PropagateParams&, void* stream, Error& error);

// All of them in one launch, for heads of at least 1: every block of an image makes the choice anew. `takes` says
// whether there is such a kernel: for scores of Float32, of which those of an image fit into shared memory, and for
// rows that it sums in the order of propagate. `error` is set where the device does not answer.
bool takes_select_propagate(const SelectPropagateParams&, bool& takes, Error& error);
bool select_propagate(const SelectPropagateParams&, void* stream, Error& error);
bool build_graph(const GraphParams&, void* workspace, void* stream, Error& error);

// Keys of Float32, BFloat16 and Float16.
size_t live_graph_workspace(const LiveGraphParams&);
bool live_graph(const LiveGraphParams&, void* workspace, void* stream, Error& error);
size_t live_select_workspace(const LiveSelectParams&);
bool live_select(const LiveSelectParams&, void* workspace, void* stream, Error& error);

}  // namespace cuda
}  // namespace gtp
