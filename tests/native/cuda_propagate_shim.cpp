// The emulated CUDA kernels of the selection and the step as C functions, for tests/test_cuda_propagate.py.

#include "cuda/propagate.cu"
#include "cuda/select.cu"

#include "shim.h"

using namespace gtp;

extern "C" {

struct ImportanceArguments {
  const float *diag, *colsum, *cls_row;
  int64_t batch, heads, tokens, prefix, source, aggregate, subtract_diag;
  float* importance;
};

static ImportanceParams importance_params(const ImportanceArguments& a) {
  ImportanceParams p;
  p.diag = a.diag;
  p.colsum = a.colsum;
  p.cls_row = a.cls_row;
  p.batch = a.batch;
  p.heads = a.heads;
  p.tokens = a.tokens;
  p.prefix = a.prefix;
  p.source = static_cast<Source>(a.source);
  p.aggregate = static_cast<Aggregate>(a.aggregate);
  p.subtract_diag = a.subtract_diag != 0;
  p.importance = a.importance;
  return p;
}

GTP_API const char* shim_token_importance(const ImportanceArguments* a) {
  return text(cuda::token_importance(importance_params(*a), nullptr, error));
}

GTP_API const char* shim_select_tokens(const float* importance, int64_t batch, int64_t count, int64_t prop,
                                       int64_t prefix, int64_t by_index, int64_t* index_kept, int64_t* index_prop) {
  SelectParams p;
  p.importance = importance;
  p.batch = batch;
  p.count = count;
  p.prop = prop;
  p.prefix = prefix;
  p.by_index = by_index != 0;
  p.index_kept = index_kept;
  p.index_prop = index_prop;
  return text(cuda::select_tokens(p, nullptr, error));
}

struct StepArguments {
  RowsArgument x, branch;
  VectorArgument layer_scale, token_scales, norm_weight, norm_bias;
  int64_t batch, tokens, channels, prefix, kept, prop;
  int64_t *index_kept, *index_prop;
  const int32_t *indptr, *indices;
  const float* values;
  const int32_t* token;
  int64_t origins, capacity, standard, norm, out_dtype;
  double alpha, norm_eps;
  const int64_t* target;
  const float* share;
  void *x_out, *normed;
  int32_t* token_out;
  void* scales_out;
};

static PropagateParams step_params(const StepArguments& a) {
  PropagateParams p;
  p.x = rows(a.x);
  p.branch = rows(a.branch);
  p.layer_scale = vector(a.layer_scale);
  p.token_scales = vector(a.token_scales);
  p.norm_weight = vector(a.norm_weight);
  p.norm_bias = vector(a.norm_bias);
  p.batch = a.batch;
  p.tokens = a.tokens;
  p.channels = a.channels;
  p.prefix = a.prefix;
  p.kept = a.kept;
  p.prop = a.prop;
  p.index_kept = a.index_kept;
  p.index_prop = a.index_prop;
  p.graph = {a.indptr, a.indices, a.values, a.token, a.origins, a.capacity};
  p.standard = static_cast<Standard>(a.standard);
  p.norm = static_cast<Norm>(a.norm);
  p.out_dtype = static_cast<DType>(a.out_dtype);
  p.alpha = a.alpha;
  p.norm_eps = a.norm_eps;
  p.target = a.target;
  p.share = a.share;
  p.x_out = a.x_out;
  p.normed = a.normed;
  p.token_out = a.token_out;
  p.scales_out = a.scales_out;
  return p;
}

GTP_API const char* shim_propagate(const StepArguments* a) {
  return text(cuda::propagate(step_params(*a), nullptr, error));
}

GTP_API const char* shim_select_propagate(const ImportanceArguments* scores, int64_t by_index, const StepArguments* a) {
  SelectPropagateParams p;
  p.importance = importance_params(*scores);
  p.by_index = by_index != 0;
  p.step = step_params(*a);
  p.index_kept = a->index_kept;
  p.index_prop = a->index_prop;
  p.step.index_kept = p.step.index_prop = nullptr;
  return text(cuda::select_propagate(p, nullptr, error));
}

}  // extern "C"
