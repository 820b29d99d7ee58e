// csrc/cuda/live.cu on the emulated GPU, for ctypes.

#include "cuda/live.cu"

#include "shim.h"

using namespace gtp;

extern "C" {

struct SelectArguments {
  const void* k;
  int64_t stride_k[4], dtype;
  const void* importance;
  int64_t importance_dtype;
  const int32_t *indptr, *indices, *rep;
  const float* sizes;
  int64_t batch, heads, tokens, head_size, prefix, prop, origins, capacity;
  double gamma;
  int64_t *index_kept, *index_prop, *target;
  float *share, *sizes_out;
  int32_t* rep_out;
};

static LiveSelectParams select_params(const SelectArguments& a) {
  LiveSelectParams p;
  p.k = a.k;
  for (int i = 0; i < 4; ++i) p.stride_k[i] = a.stride_k[i];
  p.dtype = static_cast<DType>(a.dtype);
  p.importance = {a.importance, static_cast<DType>(a.importance_dtype)};
  p.indptr = a.indptr;
  p.indices = a.indices;
  p.rep = a.rep;
  p.sizes = a.sizes;
  p.batch = a.batch;
  p.heads = a.heads;
  p.tokens = a.tokens;
  p.head_size = a.head_size;
  p.prefix = a.prefix;
  p.prop = a.prop;
  p.origins = a.origins;
  p.capacity = a.capacity;
  p.gamma = a.gamma;
  p.index_kept = a.index_kept;
  p.index_prop = a.index_prop;
  p.target = a.target;
  p.share = a.share;
  p.sizes_out = a.sizes_out;
  p.rep_out = a.rep_out;
  return p;
}

GTP_API int64_t live_select_workspace(const SelectArguments* a) {
  return static_cast<int64_t>(cuda::live_select_workspace(select_params(*a)));
}

// How many launches the choice takes.
GTP_API int64_t live_select_launches(const SelectArguments* a) {
  return cuda::task_of(select_params(*a), cuda::Machine()).one_launch ? 1 : 4;
}

GTP_API const char* live_select(const SelectArguments* a, void* workspace) {
  return text(cuda::live_select(select_params(*a), workspace, nullptr, error));
}

static LiveGraphParams graph_params(const int64_t* sizes) {
  LiveGraphParams p;
  p.batch = sizes[0], p.count = sizes[1], p.capacity = sizes[2];
  return p;
}

GTP_API int64_t live_graph_workspace(const int64_t* sizes) {
  return static_cast<int64_t>(cuda::live_graph_workspace(graph_params(sizes)));
}

GTP_API const char* live_graph(const int64_t* sizes, const int32_t* indptr, const int32_t* indices,
                               int32_t* live_indptr, int32_t* live_indices, void* workspace) {
  LiveGraphParams p = graph_params(sizes);
  p.indptr = indptr;
  p.indices = indices;
  p.live_indptr = live_indptr;
  p.live_indices = live_indices;
  return text(cuda::live_graph(p, workspace, nullptr, error));
}

}  // extern "C"
