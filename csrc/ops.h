// The ops on libtorch's stable ABI, for a CPU and for a GPU: each checks what memory safety needs (device, dtype,
// shape), allocates the outputs, fills one struct of params.h and hands it to the kernels of its device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "options.h"
#include "params.h"

namespace gtp {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

#define GTP_CHECK(condition, ...) STD_TORCH_CHECK(condition, "gtp_kernels: ", __VA_ARGS__)

std::string text_of(const int64_t* sizes, int64_t count) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < count; ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

std::string text_of(const Shape& shape) {
  return text_of(shape.data(), static_cast<int64_t>(shape.size()));
}

std::string shape_of(const Tensor& tensor) {
  return text_of(tensor.sizes().data(), tensor.dim());
}

// `layout` names the axes for the message, as in "[B, N, C]".
void check_shape(const char* name, const Tensor& tensor, const Shape& expected, const char* layout) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) same = tensor.size(static_cast<int64_t>(i)) == expected[i];
  GTP_CHECK(same, name, " has shape ", shape_of(tensor), "; it must be ", layout, " = ", text_of(expected));
}

void check_dim(const char* name, const Tensor& tensor, int64_t dim, const char* layout) {
  GTP_CHECK(tensor.dim() == dim, name, " has shape ", shape_of(tensor), "; it must be ", layout);
}

ScalarType scalar_type(DType dtype) {
  return dtype == DType::Float64    ? ScalarType::Double
         : dtype == DType::Float32  ? ScalarType::Float
         : dtype == DType::BFloat16 ? ScalarType::BFloat16
                                    : ScalarType::Half;
}

// As torch promotes two floating types: the larger; float32 for the two half types together.
DType promote(DType a, DType b) {
  if (a == b) return a;
  return a == DType::Float64 || b == DType::Float64 ? DType::Float64 : DType::Float32;
}

template <class T, class Parse>
T option(const char* name, const std::string& word, Parse parse) {
  T value{};
  std::string expected;
  GTP_CHECK(parse(word, value, expected), name, " is '", word, "'; it must be one of ", expected);
  return value;
}

template <class T>
T option(const char* name, const std::string& word) {
  return option<T>(name, word, [](const std::string& w, T& v, std::string& e) { return parse(w, v, e); });
}

bool is_paper(const std::string& semantics) {
  return option<bool>("semantics", semantics, parse_semantics);
}

// A new tensor where `like` is. The function that compiled models allocate with: torch::stable::new_empty looks up an
// operator by its name each time.
Tensor empty_strided(const Tensor& like, const Shape& shape, const Shape& stride, ScalarType type) {
  int32_t device = 0;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), stride.data(),
                                                  dtype, device, like.get_device_index(), &made));
  return Tensor(made);
}
Tensor empty(const Tensor& like, const Shape& shape, ScalarType type) {
  Shape stride(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) stride[i - 1] = stride[i] * std::max<int64_t>(shape[i], 1);
  return empty_strided(like, shape, stride, type);
}

Tensor to_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Rows need a last stride of 1; anything else is copied. The tensor returned keeps the memory alive.
Tensor with_rows(const Tensor& tensor) {
  return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Rows rows_of(const Tensor& tensor, DType dtype) {
  return {tensor.const_data_ptr(), dtype, tensor.stride(0), tensor.stride(1)};
}

void strides_of(const Tensor& tensor, int64_t* strides) {
  for (int64_t i = 0; i < tensor.dim(); ++i) strides[i] = tensor.stride(i);
}

void check_prefix(int64_t prefix, int64_t tokens) {
  GTP_CHECK(prefix >= 0 && prefix <= tokens, "num_prefix is ", prefix, "; it must be in [0, ", tokens, "]");
}

// index_kept [B, K] and index_prop [B, P], contiguous.
struct Selection {
  Tensor kept, prop;
};

template <class P>
void set_selection(P& p, const Selection& selection) {
  p.kept = selection.kept.size(1);
  p.prop = selection.prop.size(1);
  p.index_kept = static_cast<const int64_t*>(selection.kept.const_data_ptr());
  p.index_prop = static_cast<const int64_t*>(selection.prop.const_data_ptr());
}

struct Graph {
  Optional indptr, indices, values, token;
  GraphView view;
};

// The scores that `params` reads.
struct Scores {
  Tensor diag, colsum, cls_row;
  ImportanceParams params;
};

// What `params` reads, and its outputs; the indices are for the caller to set.
struct Step {
  PropagateParams params;
  Graph graph;
  Optional x, branch, layer_scale, norm_weight, norm_bias, token_scales;
  Optional x_out, normed, token_out, scales_out;
};

// select_propagate by the three kernels of a device, with the importance in memory.
template <class Device>
void in_turn(Device& device, const SelectPropagateParams& p, const Tensor& like) {
  ImportanceParams importance = p.importance;
  SelectParams select;
  select.dtype = importance.dtype;
  select.batch = importance.batch;
  select.count = importance.tokens - importance.prefix;
  select.prop = p.step.prop;
  select.prefix = importance.prefix;
  select.by_index = p.by_index;
  select.index_kept = p.index_kept;
  select.index_prop = p.index_prop;
  const Tensor values = empty(like, {select.batch, select.count}, scalar_type(select.dtype));
  importance.importance = values.mutable_data_ptr();
  select.importance = importance.importance;
  device.token_importance(importance);
  device.select_tokens(select);
  device.propagate(p.step);
}

// Device: `holds` says whether a tensor is where its kernels work, `kName` where that is; an object of it, made from
// the first argument, runs kernels, and throws what they say.
template <class Device>
struct Ops {
  static void check_device(const char* name, const Tensor& tensor) {
    GTP_CHECK(Device::holds(tensor), name, " is not on ", Device::kName, ", as the other arguments are");
  }

  static void check_type(const char* name, const Tensor& tensor, ScalarType type) {
    check_device(name, tensor);
    GTP_CHECK(tensor.scalar_type() == type, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
              "; it must be ", torch::headeronly::toString(type));
  }

  static DType floating(const char* name, const Tensor& tensor) {
    check_device(name, tensor);
    switch (tensor.scalar_type()) {
      case ScalarType::Float:
        return DType::Float32;
      case ScalarType::Double:
        return DType::Float64;
      case ScalarType::BFloat16:
        return DType::BFloat16;
      case ScalarType::Half:
        return DType::Float16;
      default:
        break;
    }
    GTP_CHECK(false, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
              "; it must be float32, float64, bfloat16 or float16");
    return DType::Float32;
  }

  static DType wide_floating(const char* name, const Tensor& tensor) {
    const DType dtype = floating(name, tensor);
    GTP_CHECK(dtype == DType::Float32 || dtype == DType::Float64, name, " has dtype ",
              torch::headeronly::toString(tensor.scalar_type()), "; it must be float32 or float64");
    return dtype;
  }

  // A contiguous copy of an optional tensor of a given shape, kept in `holder`.
  static Vector vector_of(const char* name, const Optional& tensor, const Shape& shape, const char* layout, bool wide,
                          Optional& holder) {
    if (!tensor) return {};
    const DType dtype = wide ? wide_floating(name, *tensor) : floating(name, *tensor);
    check_shape(name, *tensor, shape, layout);
    holder = to_contiguous(*tensor);
    // An empty tensor may have no memory; a null pointer would read as absent.
    static const double nothing = 0;
    const void* data = holder->const_data_ptr();
    return {data ? data : &nothing, dtype};
  }

  static Selection selection_of(const Tensor& index_kept, const Tensor& index_prop, int64_t batch) {
    check_type("index_kept", index_kept, ScalarType::Long);
    check_type("index_prop", index_prop, ScalarType::Long);
    check_dim("index_kept", index_kept, 2, "[B, K]");
    check_dim("index_prop", index_prop, 2, "[B, P]");
    check_shape("index_kept", index_kept, {batch, index_kept.size(1)}, "[B, K]");
    check_shape("index_prop", index_prop, {batch, index_prop.size(1)}, "[B, P]");
    return {to_contiguous(index_kept), to_contiguous(index_prop)};
  }

  static Graph graph_of(const Optional& indptr, const Optional& indices, const Optional& values, const Optional& token,
                        int64_t batch, int64_t count) {
    GTP_CHECK(indptr && indices && values && token,
              "standard is 'GraphProp'; indptr, indices, values and token must all be given");
    check_type("indptr", *indptr, ScalarType::Int);
    check_type("indices", *indices, ScalarType::Int);
    check_type("values", *values, ScalarType::Float);
    check_type("token", *token, ScalarType::Int);
    check_dim("indptr", *indptr, 2, "[B, n0 + 1]");
    check_dim("indices", *indices, 2, "[B, E]");
    const int64_t origins = indptr->size(1) - 1, capacity = indices->size(1);
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    GTP_CHECK(origins >= 0 && origins < most && capacity <= most, "indptr has shape ", shape_of(*indptr),
              " and indices ", shape_of(*indices), "; indptr must be [B, n0 + 1], both within int32");
    check_shape("indptr", *indptr, {batch, origins + 1}, "[B, n0 + 1]");
    check_shape("indices", *indices, {batch, capacity}, "[B, E]");
    check_shape("values", *values, {batch, capacity}, "[B, E]");
    check_shape("token", *token, {batch, count}, "[B, N - num_prefix]");
    Graph graph{to_contiguous(*indptr), to_contiguous(*indices), to_contiguous(*values), to_contiguous(*token), {}};
    graph.view.indptr = static_cast<const int32_t*>(graph.indptr->const_data_ptr());
    graph.view.indices = static_cast<const int32_t*>(graph.indices->const_data_ptr());
    graph.view.values = static_cast<const float*>(graph.values->const_data_ptr());
    graph.view.token = static_cast<const int32_t*>(graph.token->const_data_ptr());
    graph.view.origins = origins;
    graph.view.capacity = capacity;
    return graph;
  }

  // What forward and backward are given; `scales` keeps the token scales alive.
  static AttentionParams attention_of(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& token_scales,
                                      double sparsity, double scale, const std::string& semantics, Optional& scales) {
    AttentionParams p;
    p.dtype = floating("q", q);
    check_type("k", k, q.scalar_type());
    check_type("v", v, q.scalar_type());
    check_dim("q", q, 4, "[B, H, N, d]");
    const Shape shape = {q.size(0), q.size(1), q.size(2), q.size(3)};
    check_shape("k", k, shape, "[B, H, N, d]");
    check_shape("v", v, shape, "[B, H, N, d]");
    GTP_CHECK(sparsity > 0.0 && sparsity <= 1.0, "sparsity is ", sparsity, "; it must be in (0, 1]");
    p.batch = shape[0];
    p.heads = shape[1];
    p.tokens = shape[2];
    p.head_size = shape[3];
    GTP_CHECK(p.head_size > 0, "q has shape ", shape_of(q), "; d must be at least 1");
    p.token_scales = vector_of("token_scales", token_scales, {p.batch, p.tokens}, "[B, N]", true, scales);
    p.scale = scale;
    p.rank = threshold_rank(p.tokens, sparsity, is_paper(semantics));
    strides_of(q, p.stride_q);
    strides_of(k, p.stride_k);
    strides_of(v, p.stride_v);
    p.q = q.const_data_ptr();
    p.k = k.const_data_ptr();
    p.v = v.const_data_ptr();
    return p;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> attention_with_scores(const Tensor& q, const Tensor& k,
                                                                          const Tensor& v, const Optional& token_scales,
                                                                          double sparsity, double scale,
                                                                          const std::string& semantics) {
    Optional scales;
    AttentionParams p = attention_of(q, k, v, token_scales, sparsity, scale, semantics, scales);
    const ScalarType score_type = p.dtype == DType::Float64 ? ScalarType::Double : ScalarType::Float;
    // [B, N, H, d] in memory, with the strides that this has where a size is 0 too.
    const int64_t row = std::max<int64_t>(p.heads, 1) * p.head_size;
    Tensor out = empty_strided(q, {p.batch, p.heads, p.tokens, p.head_size},
                               {std::max<int64_t>(p.tokens, 1) * row, p.head_size, row, 1}, q.scalar_type());
    Tensor diag = empty(q, {p.batch, p.heads, p.tokens}, score_type);
    Tensor colsum = empty(q, {p.batch, p.heads, p.tokens}, score_type);
    Tensor cls_row = empty(q, {p.batch, p.heads, p.tokens}, score_type);
    p.out = out.mutable_data_ptr();
    p.diag = diag.mutable_data_ptr();
    p.colsum = colsum.mutable_data_ptr();
    p.cls_row = cls_row.mutable_data_ptr();
    Device(q).attention(p, q);
    return {out, diag, colsum, cls_row};
  }

  static std::tuple<Tensor, Tensor, Tensor> attention_with_scores_backward(const Tensor& grad_out, const Tensor& q,
                                                                           const Tensor& k, const Tensor& v,
                                                                           const Optional& token_scales,
                                                                           double sparsity, double scale,
                                                                           const std::string& semantics) {
    Optional scales;
    AttentionBackwardParams p;
    p.attention = attention_of(q, k, v, token_scales, sparsity, scale, semantics, scales);
    const Shape shape = {p.attention.batch, p.attention.heads, p.attention.tokens, p.attention.head_size};
    check_type("grad_out", grad_out, q.scalar_type());
    check_shape("grad_out", grad_out, shape, "[B, H, N, d]");
    strides_of(grad_out, p.stride_grad_out);
    p.grad_out = grad_out.const_data_ptr();
    Tensor grad_q = empty(q, shape, q.scalar_type());
    Tensor grad_k = empty(q, shape, q.scalar_type());
    Tensor grad_v = empty(q, shape, q.scalar_type());
    p.grad_q = grad_q.mutable_data_ptr();
    p.grad_k = grad_k.mutable_data_ptr();
    p.grad_v = grad_v.mutable_data_ptr();
    Device(q).attention_backward(p);
    return {grad_q, grad_k, grad_v};
  }

  static Scores scores_of(const Tensor& diag, const Tensor& colsum, const Tensor& cls_row, const std::string& standard,
                          int64_t num_prefix, const std::string& semantics) {
    ImportanceParams p;
    p.dtype = wide_floating("diag", diag);
    check_type("colsum", colsum, diag.scalar_type());
    check_type("cls_row", cls_row, diag.scalar_type());
    check_dim("diag", diag, 3, "[B, H, N]");
    p.batch = diag.size(0);
    p.heads = diag.size(1);
    p.tokens = diag.size(2);
    p.prefix = num_prefix;
    check_shape("colsum", colsum, {p.batch, p.heads, p.tokens}, "[B, H, N]");
    check_shape("cls_row", cls_row, {p.batch, p.heads, p.tokens}, "[B, H, N]");
    check_prefix(num_prefix, p.tokens);
    GTP_CHECK(p.heads > 0 || p.batch == 0, "diag has shape ", shape_of(diag), "; H must be at least 1");
    const Importance importance = option<Importance>("standard", standard);
    p.source = importance.source;
    p.aggregate = importance.aggregate;
    p.subtract_diag = is_paper(semantics);
    Scores scores{to_contiguous(diag), to_contiguous(colsum), to_contiguous(cls_row), p};
    scores.params.diag = scores.diag.const_data_ptr();
    scores.params.colsum = scores.colsum.const_data_ptr();
    scores.params.cls_row = scores.cls_row.const_data_ptr();
    return scores;
  }

  static Tensor importance_op(const Tensor& diag, const Tensor& colsum, const Tensor& cls_row,
                              const std::string& standard, int64_t num_prefix, const std::string& semantics) {
    Scores scores = scores_of(diag, colsum, cls_row, standard, num_prefix, semantics);
    ImportanceParams& p = scores.params;
    Tensor result = empty(diag, {p.batch, p.tokens - num_prefix}, diag.scalar_type());
    p.importance = result.mutable_data_ptr();
    Device(diag).token_importance(p);
    return result;
  }

  static void check_selection(int64_t count, int64_t num_prop, int64_t num_prefix) {
    GTP_CHECK(num_prop >= 0 && num_prop <= count, "num_prop is ", num_prop, "; it must be in [0, ", count, "]");
    GTP_CHECK(num_prefix >= 0, "num_prefix is ", num_prefix, "; it must not be negative");
    GTP_CHECK(count <= std::numeric_limits<int32_t>::max(), "there are ", count,
              " tokens to choose from; n must fit int32");
  }

  static std::tuple<Tensor, Tensor> select_op(const Tensor& importance, int64_t num_prop, int64_t num_prefix,
                                              const std::string& order) {
    SelectParams p;
    p.dtype = wide_floating("importance", importance);
    check_dim("importance", importance, 2, "[B, n]");
    p.batch = importance.size(0);
    p.count = importance.size(1);
    p.prop = num_prop;
    p.prefix = num_prefix;
    check_selection(p.count, num_prop, num_prefix);
    p.by_index = option<bool>("order", order, parse_order);
    const Tensor source = to_contiguous(importance);
    Tensor kept = empty(importance, {p.batch, p.count - num_prop}, ScalarType::Long);
    Tensor prop = empty(importance, {p.batch, num_prop}, ScalarType::Long);
    p.importance = source.const_data_ptr();
    p.index_kept = static_cast<int64_t*>(kept.mutable_data_ptr());
    p.index_prop = static_cast<int64_t*>(prop.mutable_data_ptr());
    Device(importance).select_tokens(p);
    return {kept, prop};
  }

  // propagate, and with a branch the whole block transition, for `kept` and `prop` tokens.
  static Step step_of(const Tensor& x, const Tensor* branch, const Optional& layer_scale, const Optional& indptr,
                      const Optional& indices, const Optional& values, const Optional& token, int64_t kept,
                      int64_t prop, const Optional& token_scales, const Optional& norm_weight,
                      const Optional& norm_bias, double norm_eps, const std::string& norm, const std::string& standard,
                      double alpha, int64_t num_prefix) {
    Step step;
    PropagateParams& p = step.params;
    const DType dtype = floating("x", x);
    check_dim("x", x, 3, "[B, N, C]");
    p.batch = x.size(0);
    p.tokens = x.size(1);
    p.channels = x.size(2);
    p.prefix = num_prefix;
    check_prefix(num_prefix, p.tokens);
    p.kept = kept;
    p.prop = prop;
    GTP_CHECK(kept + prop <= p.tokens - num_prefix, "index_kept and index_prop have ", kept, " and ", prop,
              " rows; x has ", p.tokens - num_prefix, " image tokens");
    p.standard = option<Standard>("standard", standard);
    p.norm = option<Norm>("norm", norm);
    p.alpha = alpha;
    p.norm_eps = norm_eps;
    if (p.standard == Standard::GraphProp) {
      step.graph = graph_of(indptr, indices, values, token, p.batch, p.tokens - num_prefix);
      p.graph = step.graph.view;
    }
    step.x = with_rows(x);
    p.x = rows_of(*step.x, dtype);
    p.out_dtype = dtype;
    if (branch) {
      const DType branch_dtype = floating("branch", *branch);
      check_shape("branch", *branch, {p.batch, p.tokens, p.channels}, "[B, N, C]");
      step.branch = with_rows(*branch);
      p.branch = rows_of(*step.branch, branch_dtype);
      p.out_dtype = promote(dtype, branch_dtype);
      // An empty tensor may have no memory; a null pointer would read as absent.
      static const double nothing = 0;
      if (!p.branch.data) p.branch.data = &nothing;
    }
    p.layer_scale = vector_of("layer_scale", layer_scale, {p.channels}, "[C]", false, step.layer_scale);
    p.norm_weight = vector_of("norm_weight", norm_weight, {p.channels}, "[C]", false, step.norm_weight);
    p.norm_bias = vector_of("norm_bias", norm_bias, {p.channels}, "[C]", false, step.norm_bias);
    p.token_scales = vector_of("token_scales", token_scales, {p.batch, p.tokens}, "[B, N]", true, step.token_scales);

    const Shape shape = {p.batch, p.rows_out(), p.channels};
    const ScalarType out_type = scalar_type(p.out_dtype);
    step.x_out = empty(x, shape, out_type);
    step.normed = empty(x, p.norm == Norm::None ? Shape{0} : shape, out_type);
    step.token_out = empty(x, p.standard == Standard::GraphProp ? Shape{p.batch, p.kept} : Shape{0}, ScalarType::Int);
    step.scales_out = token_scales ? empty(x, {p.batch, p.rows_out()}, token_scales->scalar_type())
                                   : empty(x, {0}, ScalarType::Float);
    p.x_out = step.x_out->mutable_data_ptr();
    p.normed = step.normed->mutable_data_ptr();
    p.token_out = static_cast<int32_t*>(step.token_out->mutable_data_ptr());
    p.scales_out = step.scales_out->mutable_data_ptr();
    return step;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> transition(
      const Tensor& x, const Tensor* branch, const Optional& layer_scale, const Optional& indptr,
      const Optional& indices, const Optional& values, const Optional& token, const Tensor& index_kept,
      const Tensor& index_prop, const Optional& token_scales, const Optional& norm_weight, const Optional& norm_bias,
      double norm_eps, const std::string& norm, const std::string& standard, double alpha, int64_t num_prefix) {
    check_dim("x", x, 3, "[B, N, C]");
    const Selection selection = selection_of(index_kept, index_prop, x.size(0));
    Step step =
        step_of(x, branch, layer_scale, indptr, indices, values, token, selection.kept.size(1), selection.prop.size(1),
                token_scales, norm_weight, norm_bias, norm_eps, norm, standard, alpha, num_prefix);
    set_selection(step.params, selection);
    Device(x).propagate(step.params);
    return {*step.x_out, *step.normed, *step.token_out, *step.scales_out};
  }

  // The merge of live edges: the transition with a target and a share for each row in place of a graph.
  static std::tuple<Tensor, Tensor> live_merge(const Tensor& x, const Tensor& branch, const Optional& layer_scale,
                                               const Tensor& index_kept, const Tensor& index_prop, const Tensor& target,
                                               const Tensor& share, const Optional& norm_weight,
                                               const Optional& norm_bias, double norm_eps, const std::string& norm,
                                               int64_t num_prefix) {
    check_dim("x", x, 3, "[B, N, C]");
    const Selection selection = selection_of(index_kept, index_prop, x.size(0));
    Step step = step_of(x, &branch, layer_scale, {}, {}, {}, {}, selection.kept.size(1), selection.prop.size(1), {},
                        norm_weight, norm_bias, norm_eps, norm, "None", 0.0, num_prefix);
    PropagateParams& p = step.params;
    set_selection(p, selection);
    check_type("target", target, ScalarType::Long);
    check_shape("target", target, {p.batch, p.prop}, "[B, P]");
    check_type("share", share, ScalarType::Float);
    check_shape("share", share, {p.batch, p.tokens - p.prefix}, "[B, N - num_prefix]");
    const Tensor targets = to_contiguous(target), shares = to_contiguous(share);
    p.standard = Standard::Merge;
    p.target = static_cast<const int64_t*>(targets.const_data_ptr());
    p.share = static_cast<const float*>(shares.const_data_ptr());
    Device(x).propagate(p);
    return {*step.x_out, *step.normed};
  }

  static std::tuple<Tensor, Tensor> live_graph_op(const Tensor& indptr, const Tensor& indices) {
    check_type("indptr", indptr, ScalarType::Int);
    check_type("indices", indices, ScalarType::Int);
    check_dim("indptr", indptr, 2, "[B, n + 1]");
    check_dim("indices", indices, 2, "[B, E]");
    LiveGraphParams p;
    p.batch = indptr.size(0);
    p.count = indptr.size(1) - 1;
    p.capacity = indices.size(1);
    GTP_CHECK(p.count >= 0 && 2 * p.capacity <= std::numeric_limits<int32_t>::max(), "indptr has shape ",
              shape_of(indptr), " and indices ", shape_of(indices), "; 2 E must be within int32");
    check_shape("indices", indices, {p.batch, p.capacity}, "[B, E]");
    const Tensor from = to_contiguous(indptr), columns = to_contiguous(indices);
    p.indptr = static_cast<const int32_t*>(from.const_data_ptr());
    p.indices = static_cast<const int32_t*>(columns.const_data_ptr());
    Tensor live_indptr = empty(indptr, {p.batch, p.count + 1}, ScalarType::Int);
    Tensor live_indices = empty(indptr, {p.batch, 2 * p.capacity}, ScalarType::Int);
    p.live_indptr = static_cast<int32_t*>(live_indptr.mutable_data_ptr());
    p.live_indices = static_cast<int32_t*>(live_indices.mutable_data_ptr());
    Device(indptr).live_graph(p, indptr);
    return {live_indptr, live_indices};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> live_select_op(
      const Tensor& k, const Tensor& importance, const Tensor& indptr, const Tensor& indices, const Tensor& rep,
      const Tensor& sizes, int64_t num_prop, double gamma, int64_t num_prefix) {
    LiveSelectParams p;
    p.dtype = floating("k", k);
    check_dim("k", k, 4, "[B, H, N, d]");
    p.batch = k.size(0);
    p.heads = k.size(1);
    p.tokens = k.size(2);
    p.head_size = k.size(3);
    p.prefix = num_prefix;
    check_prefix(num_prefix, p.tokens);
    const int64_t count = p.tokens - num_prefix;
    GTP_CHECK(num_prop >= 0 && (num_prop < count || num_prop == 0), "num_prop is ", num_prop, "; it must be in [0, ",
              count, ")");
    GTP_CHECK(count <= std::numeric_limits<int32_t>::max(), "there are ", count, " image tokens; n must fit int32");
    p.prop = num_prop;
    p.gamma = gamma;
    Optional values;
    p.importance = vector_of("importance", importance, {p.batch, count}, "[B, N - num_prefix]", true, values);
    check_type("indptr", indptr, ScalarType::Int);
    check_type("indices", indices, ScalarType::Int);
    check_type("rep", rep, ScalarType::Int);
    check_type("sizes", sizes, ScalarType::Float);
    check_dim("rep", rep, 2, "[B, n0]");
    check_dim("indices", indices, 2, "[B, E]");
    p.origins = rep.size(1);
    p.capacity = indices.size(1);
    // Less by a warp: a kernel's loop steps over the end.
    GTP_CHECK(std::max(p.origins, p.capacity) <= std::numeric_limits<int32_t>::max() - 32, "rep has shape ",
              shape_of(rep), " and indices ", shape_of(indices), "; n0 and E must be within int32");
    check_shape("rep", rep, {p.batch, p.origins}, "[B, n0]");
    check_shape("indptr", indptr, {p.batch, p.origins + 1}, "[B, n0 + 1]");
    check_shape("indices", indices, {p.batch, p.capacity}, "[B, E]");
    check_shape("sizes", sizes, {p.batch, p.tokens}, "[B, N]");
    const Tensor from = to_contiguous(indptr), columns = to_contiguous(indices), carrier = to_contiguous(rep);
    const Tensor counts = to_contiguous(sizes);
    p.k = k.const_data_ptr();
    strides_of(k, p.stride_k);
    p.indptr = static_cast<const int32_t*>(from.const_data_ptr());
    p.indices = static_cast<const int32_t*>(columns.const_data_ptr());
    p.rep = static_cast<const int32_t*>(carrier.const_data_ptr());
    p.sizes = static_cast<const float*>(counts.const_data_ptr());
    Tensor kept = empty(k, {p.batch, count - num_prop}, ScalarType::Long);
    Tensor prop = empty(k, {p.batch, num_prop}, ScalarType::Long);
    Tensor target = empty(k, {p.batch, num_prop}, ScalarType::Long);
    Tensor share = empty(k, {p.batch, count}, ScalarType::Float);
    Tensor sizes_out = empty(k, {p.batch, p.tokens - num_prop}, ScalarType::Float);
    Tensor rep_out = empty(k, {p.batch, p.origins}, ScalarType::Int);
    p.index_kept = static_cast<int64_t*>(kept.mutable_data_ptr());
    p.index_prop = static_cast<int64_t*>(prop.mutable_data_ptr());
    p.target = static_cast<int64_t*>(target.mutable_data_ptr());
    p.share = static_cast<float*>(share.mutable_data_ptr());
    p.sizes_out = static_cast<float*>(sizes_out.mutable_data_ptr());
    p.rep_out = static_cast<int32_t*>(rep_out.mutable_data_ptr());
    Device(k).live_select(p, k);
    return {kept, prop, target, share, sizes_out, rep_out};
  }

  static std::tuple<Tensor, Tensor, Tensor> propagate_op(const Tensor& x, const Optional& indptr,
                                                         const Optional& indices, const Optional& values,
                                                         const Optional& token, const Tensor& index_kept,
                                                         const Tensor& index_prop, const Optional& token_scales,
                                                         const std::string& standard, double alpha,
                                                         int64_t num_prefix) {
    auto result = transition(x, nullptr, {}, indptr, indices, values, token, index_kept, index_prop, token_scales, {},
                             {}, 0.0, "none", standard, alpha, num_prefix);
    return {std::get<0>(result), std::get<2>(result), std::get<3>(result)};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> residual_propagate_norm(
      const Tensor& x, const Tensor& branch, const Optional& layer_scale, const Optional& indptr,
      const Optional& indices, const Optional& values, const Optional& token, const Tensor& index_kept,
      const Tensor& index_prop, const Optional& token_scales, const Optional& norm_weight, const Optional& norm_bias,
      double norm_eps, const std::string& norm, const std::string& standard, double alpha, int64_t num_prefix) {
    return transition(x, &branch, layer_scale, indptr, indices, values, token, index_kept, index_prop, token_scales,
                      norm_weight, norm_bias, norm_eps, norm, standard, alpha, num_prefix);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> select_residual_propagate_norm(
      const Tensor& x, const Tensor& branch, const Optional& layer_scale, const Optional& indptr,
      const Optional& indices, const Optional& values, const Optional& token, const Tensor& diag, const Tensor& colsum,
      const Tensor& cls_row, const std::string& selection, int64_t num_prop, const std::string& order,
      const std::string& semantics, const Optional& token_scales, const Optional& norm_weight,
      const Optional& norm_bias, double norm_eps, const std::string& norm, const std::string& standard, double alpha,
      int64_t num_prefix) {
    const Scores scores = scores_of(diag, colsum, cls_row, selection, num_prefix, semantics);
    check_dim("x", x, 3, "[B, N, C]");
    check_shape("diag", diag, {x.size(0), scores.params.heads, x.size(1)}, "[B, H, N]");
    const int64_t batch = scores.params.batch, count = scores.params.tokens - num_prefix;
    check_selection(count, num_prop, num_prefix);
    SelectPropagateParams p;
    p.by_index = option<bool>("order", order, parse_order);
    const Step step = step_of(x, &branch, layer_scale, indptr, indices, values, token, count - num_prop, num_prop,
                              token_scales, norm_weight, norm_bias, norm_eps, norm, standard, alpha, num_prefix);
    Tensor kept = empty(x, {batch, count - num_prop}, ScalarType::Long);
    Tensor prop = empty(x, {batch, num_prop}, ScalarType::Long);
    p.importance = scores.params;
    p.step = step.params;
    p.step.index_kept = p.index_kept = static_cast<int64_t*>(kept.mutable_data_ptr());
    p.step.index_prop = p.index_prop = static_cast<int64_t*>(prop.mutable_data_ptr());
    Device(x).select_propagate(p, x);
    return {*step.x_out, *step.normed, *step.token_out, *step.scales_out, kept, prop};
  }

  static Tensor propagate_backward_op(const Tensor& grad, const Optional& indptr, const Optional& indices,
                                      const Optional& values, const Optional& token, const Tensor& index_kept,
                                      const Tensor& index_prop, const std::string& standard, double alpha,
                                      int64_t num_prefix) {
    PropagateBackwardParams p;
    const DType dtype = floating("grad", grad);
    check_dim("grad", grad, 3, "[B, N_out, C]");
    p.batch = grad.size(0);
    p.channels = grad.size(2);
    p.prefix = num_prefix;
    GTP_CHECK(num_prefix >= 0, "num_prefix is ", num_prefix, "; it must not be negative");
    const Selection selection = selection_of(index_kept, index_prop, p.batch);
    set_selection(p, selection);
    p.tokens = p.prefix + p.kept + p.prop;
    p.standard = option<Standard>("standard", standard);
    p.alpha = alpha;
    const int64_t rows_out = p.prefix + p.kept + (p.standard == Standard::Mean && p.prop > 0 ? 1 : 0);
    check_shape("grad", grad, {p.batch, rows_out, p.channels}, "[B, N_out, C]");
    Graph graph;
    if (p.standard == Standard::GraphProp) {
      graph = graph_of(indptr, indices, values, token, p.batch, p.tokens - num_prefix);
      p.graph = graph.view;
    }
    const Tensor rows = with_rows(grad);
    p.grad = rows_of(rows, dtype);
    Tensor grad_x = empty(grad, {p.batch, p.tokens, p.channels}, grad.scalar_type());
    p.grad_x = grad_x.mutable_data_ptr();
    Device(grad).propagate_backward(p);
    return grad_x;
  }

  static std::tuple<Tensor, Tensor, Tensor> propagate_dense_op(const Tensor& x, const Tensor& weight,
                                                               const Tensor& index_kept, const Tensor& index_prop,
                                                               const Optional& token_scales, double alpha,
                                                               int64_t num_prefix) {
    PropagateDenseParams p;
    const DType dtype = floating("x", x);
    p.weight_dtype = floating("weight", weight);
    check_dim("x", x, 3, "[B, N, C]");
    p.batch = x.size(0);
    p.tokens = x.size(1);
    p.channels = x.size(2);
    p.prefix = num_prefix;
    check_prefix(num_prefix, p.tokens);
    const int64_t count = p.tokens - num_prefix;
    check_shape("weight", weight, {p.batch, count, count}, "[B, n, n]");
    const Selection selection = selection_of(index_kept, index_prop, p.batch);
    set_selection(p, selection);
    p.alpha = alpha;
    const Tensor rows = with_rows(x);
    p.x = rows_of(rows, dtype);
    p.weight = weight.const_data_ptr();
    strides_of(weight, p.stride_weight);
    Optional scales_holder;
    p.token_scales = vector_of("token_scales", token_scales, {p.batch, p.tokens}, "[B, N]", true, scales_holder);

    const int64_t rows_out = num_prefix + p.kept;
    Tensor x_out = empty(x, {p.batch, rows_out, p.channels}, x.scalar_type());
    Tensor weight_out = empty(weight, {p.batch, p.kept, p.kept}, weight.scalar_type());
    Tensor scales_out =
        token_scales ? empty(x, {p.batch, rows_out}, token_scales->scalar_type()) : empty(x, {0}, ScalarType::Float);
    p.x_out = x_out.mutable_data_ptr();
    p.weight_out = weight_out.mutable_data_ptr();
    p.scales_out = scales_out.mutable_data_ptr();
    Device(x).propagate_dense(p);
    return {x_out, weight_out, scales_out};
  }

  static std::tuple<Tensor, Tensor, Tensor> build_graph_op(const Tensor& x, int64_t height, int64_t width,
                                                           const std::string& graph_type, int64_t num_neighbours,
                                                           int64_t num_prefix, const std::string& semantics) {
    GraphParams p;
    const DType dtype = floating("x", x);
    check_dim("x", x, 3, "[B, N, C]");
    p.batch = x.size(0);
    p.tokens = x.size(1);
    p.channels = x.size(2);
    p.prefix = num_prefix;
    check_prefix(num_prefix, p.tokens);
    const int64_t count = p.tokens - num_prefix;
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    GTP_CHECK(height >= 0 && width >= 0 && height <= most && width <= most && height * width == count, "the grid is ",
              height, " x ", width, "; it must have N - num_prefix = ", count, " cells");
    GTP_CHECK(num_neighbours >= 0 && (num_neighbours < count || num_neighbours == 0), "num_neighbours is ",
              num_neighbours, "; it must be in [0, ", count, ")");
    p.height = height;
    p.width = width;
    p.type = option<GraphType>("graph_type", graph_type);
    p.neighbours = graph_neighbours(count, num_neighbours, num_prefix, is_paper(semantics));
    p.capacity = graph_capacity(height, width, p.type, p.neighbours);
    GTP_CHECK(count < most && p.capacity <= most, "the graph of ", count, " tokens would have ", p.capacity,
              " edges; both must fit int32");
    const Tensor rows = with_rows(x);
    p.x = rows_of(rows, dtype);
    Tensor indptr = empty(x, {p.batch, count + 1}, ScalarType::Int);
    Tensor indices = empty(x, {p.batch, p.capacity}, ScalarType::Int);
    Tensor values = empty(x, {p.batch, p.capacity}, ScalarType::Float);
    p.indptr = static_cast<int32_t*>(indptr.mutable_data_ptr());
    p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
    p.values = static_cast<float*>(values.mutable_data_ptr());
    Device(x).build_graph(p, x);
    return {indptr, indices, values};
  }
};

}  // namespace
}  // namespace gtp
