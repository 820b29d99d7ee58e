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

// token_importance, select_tokens and propagate in one launch: every block of an image makes the choice anew. Of `step`
// the indices are not read; heads of at least 1. False where the scores of an image do not fit into shared memory.
struct SelectPropagateParams {
  ImportanceParams importance;  // Float32; its output may be null
  bool by_index = true;
  int64_t *index_kept = nullptr, *index_prop = nullptr;  // [B, K], [B, P]: outputs
  PropagateParams step;
};
bool select_propagate(const SelectPropagateParams&, void* stream, Error& error);
bool build_graph(const GraphParams&, void* workspace, void* stream, Error& error);

}  // namespace cuda
}  // namespace gtp
