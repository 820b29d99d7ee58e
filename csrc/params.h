// What every kernel is given, on a CPU and on a GPU: plain structs of pointers, sizes and strides; no torch, no Python.
//
// Common to all of them
// - Strides count elements. An array described as [B, N] without strides is contiguous.
// - An output is overwritten, never added to, and must not overlap an input.
// - Any size may be 0, and nothing is read or written outside the arrays described. Index values, token maps and CSR
//   contents are data, not promises: cpu/ and cuda/ say what becomes of a bad one.
// - Half types are computed in float32, float64 in double. The result does not depend on how the work is cut.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define GTP_API __declspec(dllexport)
#else
#define GTP_API __attribute__((visibility("default")))
#endif

// Helpers of this header are forced inline: it is compiled for several instruction sets, and a merged copy would be one
// of them for all.
#if defined(__CUDACC__)
#define GTP_FORCE_INLINE __host__ __device__ __forceinline__
#else
#define GTP_FORCE_INLINE inline __attribute__((always_inline))
#endif

namespace gtp {

enum class DType : int32_t { Float32, Float64, BFloat16, Float16 };
enum class Standard : int32_t { None, Mean, GraphProp, Merge };
enum class Norm : int32_t { None, Layer, Rms };
enum class GraphType : int32_t { Spatial, Semantic, Mixed };
enum class Aggregate : int32_t { Mean, Max };
enum class Source : int32_t { Cls, Image, Diagonal, Mixed, Sum };

GTP_FORCE_INLINE int64_t size_of(DType dtype) {
  return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2;
}

struct Error {
  char text[256] = {0};
};

// Rows of C elements, the last stride 1: element (b, n, c) is data[b * stride_b + n * stride_n + c].
struct Rows {
  const void* data = nullptr;
  DType dtype = DType::Float32;
  int64_t stride_b = 0;
  int64_t stride_n = 0;
};

// A vector of any floating type; data == nullptr where it does not apply.
struct Vector {
  const void* data = nullptr;
  DType dtype = DType::Float32;
};

// out = mask(softmax(q k^T scale + log(token_scales))) v, and the sums of that masked map.
// mask: per (image, head), values below the rank-th smallest of the N * N map become 0 (NaN counts as the largest and
// stays); rank 0 keeps all. Nothing is renormalised.
struct AttentionParams {
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  int64_t stride_q[4] = {}, stride_k[4] = {}, stride_v[4] = {};  // [B, H, N, d], any strides
  DType dtype = DType::Float32;                                  // of q, k, v and out
  Vector token_scales;                                           // [B, N], Float32 or Float64
  int64_t batch = 0, heads = 0, tokens = 0, head_size = 0;
  double scale = 1;
  int64_t rank = 0;
  bool force_miss = false;  // tests: treat the sampled bracket as missed, so that the radix passes run
  void* out = nullptr;      // [B, N, H, d]
  void *diag = nullptr, *colsum = nullptr, *cls_row = nullptr;  // [B, H, N], double for Float64, float otherwise
};

// The gradients of q, k and v from that of out; the map is computed again. With dA = dout v^T where the mask keeps,
// else 0: grad_v = mask(A)^T dout, dS = A (dA - sum_j A_j dA_j) scale, grad_q = dS k, grad_k = dS^T q; A itself is not
// masked. token_scales get none. The map, threshold included, is that of the forward on the same instruction set.
struct AttentionBackwardParams {
  AttentionParams attention;  // its outputs are not used
  const void* grad_out = nullptr;
  int64_t stride_grad_out[4] = {};                               // [B, H, N, d], any strides
  void *grad_q = nullptr, *grad_k = nullptr, *grad_v = nullptr;  // [B, H, N, d]; like grad_out of q's type
};

// The 1-based rank of the threshold among the N * N values of a map, 0 where everything stays.
// official: the k-th smallest, k = int(N * N * (1 - sparsity)). paper: the ceil(sparsity * N * N)-th largest.
GTP_API int64_t threshold_rank(int64_t tokens, double sparsity, bool paper);

// importance [B, n], n = N - prefix, from [B, H, N] scores of one type (Float32 or Float64), B * H * N contiguous.
// subtract_diag: colsum - diag takes the place of colsum, per head.
struct ImportanceParams {
  const void *diag = nullptr, *colsum = nullptr, *cls_row = nullptr;
  DType dtype = DType::Float32;
  int64_t batch = 0, heads = 0, tokens = 0, prefix = 0;
  Source source = Source::Mixed;
  Aggregate aggregate = Aggregate::Max;
  bool subtract_diag = false;
  void* importance = nullptr;
};

// The `prop` lowest of n leave; ties: the higher index leaves. NaN is below -inf, -0 equals 0.
// by_index: both outputs ascend by index; otherwise by falling importance, ties by rising index.
struct SelectParams {
  const void* importance = nullptr;  // [B, n]
  DType dtype = DType::Float32;      // Float32 or Float64
  int64_t batch = 0, count = 0, prop = 0, prefix = 0;
  bool by_index = false;
  int64_t *index_kept = nullptr, *index_prop = nullptr;  // [B, n - prop], [B, prop], with prefix added
};

// One CSR per image over `origins` original tokens; row t owns the entries indptr[t] .. indptr[t + 1].
struct GraphView {
  const int32_t *indptr = nullptr, *indices = nullptr;  // [B, origins + 1], [B, capacity]
  const float* values = nullptr;                        // [B, capacity]
  const int32_t* token = nullptr;                       // [B, n], the original token behind each image row
  int64_t origins = 0, capacity = 0;
};

// y = x, or x + layer_scale * branch. x_out = the prefix rows of y, then for each kept i, in order,
//   y_i + alpha * sum_j values(token_i -> token_j) y_j     over the propagated j, in CSR order;
// a row without such an edge is copied bit for bit. Mean appends the mean of the propagated rows (nothing for P = 0),
// None appends nothing; neither reads the graph. Merge: share_i y_i + sum_j share_j y_j over the j whose target is i, a
// row without any copied bit for bit, and no token_scales. Rounded once, then normed = norm(x_out) reads the rounded
// values. token_scales go the same way, except that Mean appends their sum.
struct PropagateParams {
  Rows x, branch;      // [B, N, C]; branch.data may be null
  Vector layer_scale;  // [C]
  int64_t batch = 0, tokens = 0, channels = 0, prefix = 0, kept = 0, prop = 0;
  const int64_t *index_kept = nullptr, *index_prop = nullptr;  // [B, K], [B, P], values in [prefix, N)
  GraphView graph;
  Standard standard = Standard::GraphProp;
  double alpha = 0;
  const int64_t* target = nullptr;  // [B, P], Merge: the kept row, 0 to K - 1, or -1 for a row that is dropped
  const float* share = nullptr;     // [B, N - prefix], Merge
  Vector token_scales;              // [B, N], Float32 or Float64
  Norm norm = Norm::None;
  Vector norm_weight, norm_bias;  // [C]
  double norm_eps = 0;
  DType out_dtype = DType::Float32;  // of x_out and normed
  void *x_out = nullptr, *normed = nullptr;
  int32_t* token_out = nullptr;  // [B, K], GraphProp only
  void* scales_out = nullptr;    // [B, rows_out], the type of token_scales
  GTP_FORCE_INLINE int64_t rows_out() const {
    return prefix + kept + (standard == Standard::Mean && prop > 0 ? 1 : 0);
  }
};

// token_importance, select_tokens and propagate one after the other, bit for bit. The indices of `step` are the
// outputs.
struct SelectPropagateParams {
  ImportanceParams importance;  // its output may be null
  bool by_index = true;
  int64_t *index_kept = nullptr, *index_prop = nullptr;  // [B, K], [B, P]: outputs
  PropagateParams step;
};

// grad_x [B, N, C] contiguous: the transpose of the map above in x (no branch, no norm).
struct PropagateBackwardParams {
  Rows grad;  // [B, rows_out, C]
  int64_t batch = 0, tokens = 0, channels = 0, prefix = 0, kept = 0, prop = 0;
  const int64_t *index_kept = nullptr, *index_prop = nullptr;
  GraphView graph;
  Standard standard = Standard::GraphProp;
  double alpha = 0;
  void* grad_x = nullptr;  // the type of grad
};

// x_out as in propagate with a dense weight [B, n, n], whose zeros are no edges; weight_out = weight[kept][:, kept].
struct PropagateDenseParams {
  Rows x;
  const void* weight = nullptr;
  DType weight_dtype = DType::Float32;
  int64_t stride_weight[3] = {};
  int64_t batch = 0, tokens = 0, channels = 0, prefix = 0, kept = 0, prop = 0;
  const int64_t *index_kept = nullptr, *index_prop = nullptr;
  double alpha = 0;
  Vector token_scales;
  void *x_out = nullptr, *weight_out = nullptr, *scales_out = nullptr;
};

// The directed graph of the image tokens x[:, prefix:], h * w of them, rows sorted by column.
// values = 1 / sqrt(deg_i * deg_j), 0 where a degree is 0; entries beyond indptr[:, n] are zero.
struct GraphParams {
  Rows x;  // [B, N, C]
  int64_t batch = 0, tokens = 0, channels = 0, prefix = 0, height = 0, width = 0;
  GraphType type = GraphType::Mixed;
  int64_t neighbours = 0;  // per row, already clipped to n - 1
  int64_t capacity = 0;    // graph_capacity(...)
  int32_t *indptr = nullptr, *indices = nullptr;
  float* values = nullptr;
};

// Both directions of every edge, once, sorted by column: the CSR of live edges.
struct LiveGraphParams {
  const int32_t *indptr = nullptr, *indices = nullptr;  // [B, n + 1], [B, capacity]
  int64_t batch = 0, count = 0, capacity = 0;
  int32_t *live_indptr = nullptr, *live_indices = nullptr;  // [B, n + 1], [B, 2 * capacity]
};

// Which rows leave, and where each goes, by live edges: reference/live.py is the definition. T: double for keys of
// Float64, else float.
struct LiveSelectParams {
  const void* k = nullptr;
  int64_t stride_k[4] = {};  // [B, H, N, d], any strides
  DType dtype = DType::Float32;
  Vector importance;                                                    // [B, n], Float32 or Float64
  const int32_t *indptr = nullptr, *indices = nullptr, *rep = nullptr;  // [B, n0 + 1], [B, E], [B, n0]
  const float* sizes = nullptr;                                         // [B, N]
  int64_t batch = 0, heads = 0, tokens = 0, head_size = 0, prefix = 0, prop = 0;
  int64_t origins = 0, capacity = 0;
  double gamma = 0;
  int64_t *index_kept = nullptr, *index_prop = nullptr, *target = nullptr;  // [B, n - P], [B, P], [B, P]
  float *share = nullptr, *sizes_out = nullptr;                             // [B, n], [B, N - P]
  int32_t* rep_out = nullptr;                                               // [B, n0]
};

GTP_API int64_t graph_neighbours(int64_t count, int64_t asked, int64_t prefix, bool paper);
GTP_API int64_t graph_capacity(int64_t height, int64_t width, GraphType type, int64_t neighbours);

}  // namespace gtp
