// gtp_kernels._C: build information, and the raw CPU routines over NumPy arrays for tests that need no dispatcher.
//
// Every routine takes float16, float32 or float64 arrays of the shapes in cpu/kernels.h, and by keyword `isa` (one of
// isas(); None: the one chosen at run time) and `threads`. A wrong shape, dtype or value is a ValueError.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "options.h"

namespace py = pybind11;
using namespace py::literals;

namespace gtp {
namespace {

using Shape = std::vector<py::ssize_t>;
using Optional = std::optional<py::array>;

// Cuts the range into as many pieces as there are threads; what one of them throws is thrown again here.
thread_local int runner_threads = 1;
const Parallel kParallel = {[](int64_t count, int64_t, Parallel::Body body, void* context) {
  const int64_t threads = std::min<int64_t>(runner_threads, count);
  if (threads <= 1) return body(context, 0, count);
  std::vector<std::thread> pool;
  std::vector<std::exception_ptr> thrown(static_cast<size_t>(threads));
  for (int64_t t = 0; t < threads; ++t) {
    pool.emplace_back([=, &thrown] {
      try {
        body(context, count * t / threads, count * (t + 1) / threads);
      } catch (...) {
        thrown[static_cast<size_t>(t)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  for (const std::exception_ptr& exception : thrown) {
    if (exception) std::rethrow_exception(exception);
  }
}};

// The table to run, with the number of threads set for this call.
const Kernels& kernels_of(const std::optional<std::string>& isa, int threads) {
  if (threads < 1) throw py::value_error("threads must be at least 1; got " + std::to_string(threads));
  runner_threads = threads;
  return isa ? kernels_for(isa->c_str()) : kernels();
}

std::string text_of(const py::ssize_t* sizes, py::ssize_t count) {
  std::ostringstream text;
  text << '(';
  for (py::ssize_t i = 0; i < count; ++i) text << (i ? ", " : "") << sizes[i];
  text << ')';
  return text.str();
}

void check_shape(const char* name, const py::array& array, const Shape& expected) {
  if (array.ndim() != static_cast<py::ssize_t>(expected.size()) ||
      !std::equal(expected.begin(), expected.end(), array.shape())) {
    throw py::value_error(std::string(name) + " has shape " + text_of(array.shape(), array.ndim()) + "; it must be " +
                          text_of(expected.data(), static_cast<py::ssize_t>(expected.size())));
  }
}

void check_dim(const char* name, const py::array& array, py::ssize_t dim) {
  if (array.ndim() != dim) {
    throw py::value_error(std::string(name) + " has shape " + text_of(array.shape(), array.ndim()) + "; it must have " +
                          std::to_string(dim) + " axes");
  }
}

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    throw py::value_error(std::string(name) + " is " + std::to_string(value) + "; it must be in [" +
                          std::to_string(low) + ", " + std::to_string(high) + "]");
  }
}

DType floating(const char* name, const py::array& array) {
  if (array.dtype().kind() == 'f' && array.dtype().attr("isnative").cast<bool>()) {
    if (array.itemsize() == 2) return DType::Float16;
    if (array.itemsize() == 4) return DType::Float32;
    if (array.itemsize() == 8) return DType::Float64;
  }
  throw py::value_error(std::string(name) + " has dtype " + py::str(array.dtype()).cast<std::string>() +
                        "; it must be float16, float32 or float64");
}

DType wide_floating(const char* name, const py::array& array) {
  const DType dtype = floating(name, array);
  if (dtype == DType::Float16) throw py::value_error(std::string(name) + " must be float32 or float64; got float16");
  return dtype;
}

const char* numpy_name(DType dtype) {
  return dtype == DType::Float64 ? "float64" : dtype == DType::Float32 ? "float32" : "float16";
}

py::array empty(const Shape& shape, const char* dtype) {
  return py::array(py::dtype(dtype), shape);
}

py::array contiguous(const py::array& array) {
  return py::array::ensure(array, py::array::c_style);
}

template <class T>
py::array_t<T, py::array::c_style> integers(const char* name, const py::array& array) {
  if (!py::dtype::of<T>().is(array.dtype()) && !py::dtype::of<T>().equal(array.dtype())) {
    throw py::value_error(std::string(name) + " has dtype " + py::str(array.dtype()).cast<std::string>() +
                          "; it must be " + py::str(py::dtype::of<T>()).cast<std::string>());
  }
  return py::array_t<T, py::array::c_style>(array);
}

template <class T>
T option(const char* name, const std::string& word, bool (*parser)(const std::string&, T&, std::string&)) {
  T value{};
  std::string expected;
  if (!parser(word, value, expected)) {
    throw py::value_error(std::string(name) + " is '" + word + "'; it must be one of " + expected);
  }
  return value;
}

bool is_paper(const std::string& semantics) {
  return option<bool>("semantics", semantics, parse_semantics);
}

void check(bool ok, const Error& error) {
  if (!ok) throw py::value_error(error.text);
}

// A contiguous array of a given shape, kept in `holder`.
Vector vector_of(const char* name, const Optional& array, const Shape& shape, bool wide, py::array& holder) {
  if (!array) return {};
  const DType dtype = wide ? wide_floating(name, *array) : floating(name, *array);
  check_shape(name, *array, shape);
  holder = contiguous(*array);
  return {holder.data(), dtype};
}

void strides_of(const py::array& array, int64_t* strides) {
  for (py::ssize_t i = 0; i < array.ndim(); ++i) strides[i] = array.strides(i) / array.itemsize();
}

// Strides in whole elements, or a copy.
py::array with_whole_strides(const py::array& array) {
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    if (array.strides(i) % array.itemsize() != 0) return contiguous(array);
  }
  return array;
}

py::array with_rows(const py::array& array) {
  const py::array whole = with_whole_strides(array);
  return whole.shape(2) <= 1 || whole.strides(2) == whole.itemsize() ? whole : contiguous(whole);
}

Rows rows_of(const py::array& array, DType dtype) {
  return {array.data(), dtype, array.strides(0) / array.itemsize(), array.strides(1) / array.itemsize()};
}

// What forward and backward are given; q, k, v have whole strides, `scales` keeps the token scales alive.
AttentionParams attention_of(const py::array& q, const py::array& k, const py::array& v, const Optional& token_scales,
                             double sparsity, std::optional<double> scale, const std::string& semantics,
                             bool force_miss, py::array& scales) {
  AttentionParams p;
  p.dtype = floating("q", q);
  check_dim("q", q, 4);
  const Shape shape(q.shape(), q.shape() + 4);
  check_shape("k", k, shape);
  check_shape("v", v, shape);
  if (floating("k", k) != p.dtype || floating("v", v) != p.dtype) throw py::value_error("q, k, v must have one dtype");
  if (!(sparsity > 0 && sparsity <= 1)) {
    throw py::value_error("sparsity is " + std::to_string(sparsity) + "; it must be in (0, 1]");
  }
  check_range("the head size of q", shape[3], 1, std::numeric_limits<int32_t>::max());
  p.batch = shape[0];
  p.heads = shape[1];
  p.tokens = shape[2];
  p.head_size = shape[3];
  p.scale = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(p.head_size));
  p.rank = threshold_rank(p.tokens, sparsity, is_paper(semantics));
  p.force_miss = force_miss;
  p.token_scales = vector_of("token_scales", token_scales, {shape[0], shape[2]}, true, scales);
  strides_of(q, p.stride_q);
  strides_of(k, p.stride_k);
  strides_of(v, p.stride_v);
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  return p;
}

py::tuple attention_with_scores(const py::array& q_, const py::array& k_, const py::array& v_,
                                const Optional& token_scales, double sparsity, std::optional<double> scale,
                                const std::string& semantics, bool force_miss, int threads,
                                const std::optional<std::string>& isa) {
  const py::array q = with_whole_strides(q_), k = with_whole_strides(k_), v = with_whole_strides(v_);
  py::array scales;
  AttentionParams p = attention_of(q, k, v, token_scales, sparsity, scale, semantics, force_miss, scales);
  const Shape shape(q.shape(), q.shape() + 4);
  const char* score_type = p.dtype == DType::Float64 ? "float64" : "float32";
  py::array out = empty({shape[0], shape[2], shape[1], shape[3]}, numpy_name(p.dtype));
  py::array diag = empty({shape[0], shape[1], shape[2]}, score_type);
  py::array colsum = empty({shape[0], shape[1], shape[2]}, score_type);
  py::array cls_row = empty({shape[0], shape[1], shape[2]}, score_type);
  p.out = out.mutable_data();
  p.diag = diag.mutable_data();
  p.colsum = colsum.mutable_data();
  p.cls_row = cls_row.mutable_data();
  kernels_of(isa, threads).attention(p, kParallel);
  return py::make_tuple(out.attr("transpose")(0, 2, 1, 3), diag, colsum, cls_row);
}

py::tuple attention_with_scores_backward(const py::array& grad_out_, const py::array& q_, const py::array& k_,
                                         const py::array& v_, const Optional& token_scales, double sparsity,
                                         std::optional<double> scale, const std::string& semantics, bool force_miss,
                                         int threads, const std::optional<std::string>& isa) {
  const py::array q = with_whole_strides(q_), k = with_whole_strides(k_), v = with_whole_strides(v_);
  const py::array grad_out = with_whole_strides(grad_out_);
  py::array scales;
  AttentionBackwardParams p;
  p.attention = attention_of(q, k, v, token_scales, sparsity, scale, semantics, force_miss, scales);
  const Shape shape(q.shape(), q.shape() + 4);
  check_shape("grad_out", grad_out, shape);
  if (floating("grad_out", grad_out) != p.attention.dtype) throw py::value_error("grad_out must have q's dtype");
  strides_of(grad_out, p.stride_grad_out);
  p.grad_out = grad_out.data();
  const char* dtype = numpy_name(p.attention.dtype);
  py::array grad_q = empty(shape, dtype), grad_k = empty(shape, dtype), grad_v = empty(shape, dtype);
  p.grad_q = grad_q.mutable_data();
  p.grad_k = grad_k.mutable_data();
  p.grad_v = grad_v.mutable_data();
  kernels_of(isa, threads).attention_backward(p, kParallel);
  return py::make_tuple(grad_q, grad_k, grad_v);
}

py::array importance_of(const py::array& diag, const py::array& colsum, const py::array& cls_row,
                        const std::string& standard, int64_t num_prefix, const std::string& semantics, int threads) {
  ImportanceParams p;
  p.dtype = wide_floating("diag", diag);
  check_dim("diag", diag, 3);
  const Shape shape(diag.shape(), diag.shape() + 3);
  check_shape("colsum", colsum, shape);
  check_shape("cls_row", cls_row, shape);
  if (floating("colsum", colsum) != p.dtype || floating("cls_row", cls_row) != p.dtype) {
    throw py::value_error("diag, colsum, cls_row must have one dtype");
  }
  check_range("num_prefix", num_prefix, 0, shape[2]);
  check_range("the number of heads", shape[1], 1, std::numeric_limits<int32_t>::max());
  p.batch = shape[0];
  p.heads = shape[1];
  p.tokens = shape[2];
  p.prefix = num_prefix;
  const Importance importance = option<Importance>("standard", standard, parse);
  p.source = importance.source;
  p.aggregate = importance.aggregate;
  p.subtract_diag = is_paper(semantics);
  const py::array d = contiguous(diag), c = contiguous(colsum), r = contiguous(cls_row);
  p.diag = d.data();
  p.colsum = c.data();
  p.cls_row = r.data();
  py::array result = empty({shape[0], shape[2] - static_cast<py::ssize_t>(num_prefix)}, numpy_name(p.dtype));
  p.importance = result.mutable_data();
  kernels_of({}, threads);
  token_importance(p, kParallel);
  return result;
}

py::tuple select_of(const py::array& importance, int64_t num_prop, int64_t num_prefix, const std::string& order,
                    int threads) {
  SelectParams p;
  p.dtype = wide_floating("importance", importance);
  check_dim("importance", importance, 2);
  p.batch = importance.shape(0);
  p.count = importance.shape(1);
  p.prop = num_prop;
  p.prefix = num_prefix;
  check_range("num_prop", num_prop, 0, p.count);
  check_range("num_prefix", num_prefix, 0, std::numeric_limits<int32_t>::max());
  p.by_index = option<bool>("order", order, parse_order);
  const py::array source = contiguous(importance);
  py::array_t<int64_t> kept(Shape{p.batch, p.count - num_prop}), prop(Shape{p.batch, num_prop});
  p.importance = source.data();
  p.index_kept = kept.mutable_data();
  p.index_prop = prop.mutable_data();
  kernels_of({}, threads);
  select_tokens(p, kParallel);
  return py::make_tuple(kept, prop);
}

struct Selection {
  py::array_t<int64_t, py::array::c_style> kept, prop;

  Selection(const py::array& index_kept, const py::array& index_prop, py::ssize_t batch)
      : kept(integers<int64_t>("index_kept", index_kept)), prop(integers<int64_t>("index_prop", index_prop)) {
    check_dim("index_kept", kept, 2);
    check_dim("index_prop", prop, 2);
    check_shape("index_kept", kept, {batch, kept.shape(1)});
    check_shape("index_prop", prop, {batch, prop.shape(1)});
  }
  template <class P>
  void set(P& p) const {
    p.kept = kept.shape(1);
    p.prop = prop.shape(1);
    p.index_kept = kept.data();
    p.index_prop = prop.data();
  }
};

// The CSR graph as a tuple (indptr, indices, values, token).
struct Graph {
  py::array_t<int32_t, py::array::c_style> indptr, indices, token;
  py::array_t<float, py::array::c_style> values;

  Graph(const std::optional<py::tuple>& graph, py::ssize_t batch, py::ssize_t count) {
    if (!graph || graph->size() != 4) {
      throw py::value_error("standard is 'GraphProp'; graph must be (indptr, indices, values, token)");
    }
    indptr = integers<int32_t>("indptr", (*graph)[0].cast<py::array>());
    indices = integers<int32_t>("indices", (*graph)[1].cast<py::array>());
    values = integers<float>("values", (*graph)[2].cast<py::array>());
    token = integers<int32_t>("token", (*graph)[3].cast<py::array>());
    check_dim("indptr", indptr, 2);
    check_dim("indices", indices, 2);
    check_range("the second axis of indptr", indptr.shape(1), 1, std::numeric_limits<int32_t>::max());
    check_range("the second axis of indices", indices.shape(1), 0, std::numeric_limits<int32_t>::max());
    check_shape("indptr", indptr, {batch, indptr.shape(1)});
    check_shape("indices", indices, {batch, indices.shape(1)});
    check_shape("values", values, {batch, indices.shape(1)});
    check_shape("token", token, {batch, count});
  }
  GraphView view() const {
    return {indptr.data(), indices.data(), values.data(), token.data(), indptr.shape(1) - 1, indices.shape(1)};
  }
};

py::tuple residual_propagate_norm(const py::array& x_, const Optional& branch_, const Optional& layer_scale,
                                  const std::optional<py::tuple>& graph, const py::array& index_kept,
                                  const py::array& index_prop, const Optional& token_scales,
                                  const Optional& norm_weight, const Optional& norm_bias, double norm_eps,
                                  const std::string& norm, const std::string& standard, double alpha,
                                  int64_t num_prefix, int threads, const std::optional<std::string>& isa) {
  check_dim("x", x_, 3);
  const py::array x = with_rows(x_);
  const Shape shape(x.shape(), x.shape() + 3);
  PropagateParams p;
  p.x = rows_of(x, floating("x", x));
  p.out_dtype = p.x.dtype;
  p.batch = shape[0];
  p.tokens = shape[1];
  p.channels = shape[2];
  p.prefix = num_prefix;
  check_range("num_prefix", num_prefix, 0, p.tokens);
  py::array branch;
  if (branch_) {
    check_shape("branch", *branch_, shape);
    branch = with_rows(*branch_);
    p.branch = rows_of(branch, floating("branch", branch));
    p.out_dtype = size_of(p.branch.dtype) > size_of(p.x.dtype) ? p.branch.dtype : p.x.dtype;
  }
  const Selection selection(index_kept, index_prop, shape[0]);
  selection.set(p);
  p.standard = option<Standard>("standard", standard, parse);
  p.norm = option<Norm>("norm", norm, parse);
  p.alpha = alpha;
  p.norm_eps = norm_eps;
  std::optional<Graph> csr;
  if (p.standard == Standard::GraphProp) {
    csr.emplace(graph, shape[0], shape[1] - static_cast<py::ssize_t>(num_prefix));
    p.graph = csr->view();
  }
  py::array scale_holder, weight_holder, bias_holder, scales_holder;
  p.layer_scale = vector_of("layer_scale", layer_scale, {shape[2]}, false, scale_holder);
  p.norm_weight = vector_of("norm_weight", norm_weight, {shape[2]}, false, weight_holder);
  p.norm_bias = vector_of("norm_bias", norm_bias, {shape[2]}, false, bias_holder);
  p.token_scales = vector_of("token_scales", token_scales, {shape[0], shape[1]}, true, scales_holder);
  const Shape out_shape = {shape[0], static_cast<py::ssize_t>(p.rows_out()), shape[2]};
  py::array x_out = empty(out_shape, numpy_name(p.out_dtype));
  py::array normed = empty(p.norm == Norm::None ? Shape{0} : out_shape, numpy_name(p.out_dtype));
  py::array_t<int32_t> token_out(csr ? Shape{shape[0], static_cast<py::ssize_t>(p.kept)} : Shape{0});
  py::array scales_out =
      token_scales ? empty({out_shape[0], out_shape[1]}, numpy_name(p.token_scales.dtype)) : empty({0}, "float32");
  p.x_out = x_out.mutable_data();
  p.normed = normed.mutable_data();
  p.token_out = token_out.mutable_data();
  p.scales_out = scales_out.mutable_data();
  Error error;
  check(kernels_of(isa, threads).propagate(p, kParallel, error), error);
  return py::make_tuple(x_out, normed, token_out, scales_out);
}

py::tuple propagate_of(const py::array& x, const std::optional<py::tuple>& graph, const py::array& index_kept,
                       const py::array& index_prop, const Optional& token_scales, const std::string& standard,
                       double alpha, int64_t num_prefix, int threads, const std::optional<std::string>& isa) {
  const py::tuple all = residual_propagate_norm(x, {}, {}, graph, index_kept, index_prop, token_scales, {}, {}, 0.0,
                                                "none", standard, alpha, num_prefix, threads, isa);
  return py::make_tuple(all[0], all[2], all[3]);
}

py::array propagate_backward_of(const py::array& grad_, const std::optional<py::tuple>& graph,
                                const py::array& index_kept, const py::array& index_prop, const std::string& standard,
                                double alpha, int64_t num_prefix, int threads, const std::optional<std::string>& isa) {
  check_dim("grad", grad_, 3);
  const py::array grad = with_rows(grad_);
  PropagateBackwardParams p;
  p.grad = rows_of(grad, floating("grad", grad));
  p.batch = grad.shape(0);
  p.channels = grad.shape(2);
  p.prefix = num_prefix;
  check_range("num_prefix", num_prefix, 0, std::numeric_limits<int32_t>::max());
  const Selection selection(index_kept, index_prop, grad.shape(0));
  selection.set(p);
  p.tokens = p.prefix + p.kept + p.prop;
  p.standard = option<Standard>("standard", standard, parse);
  p.alpha = alpha;
  const int64_t rows_out = p.prefix + p.kept + (p.standard == Standard::Mean && p.prop > 0 ? 1 : 0);
  check_shape("grad", grad, {grad.shape(0), static_cast<py::ssize_t>(rows_out), grad.shape(2)});
  std::optional<Graph> csr;
  if (p.standard == Standard::GraphProp) {
    csr.emplace(graph, grad.shape(0), static_cast<py::ssize_t>(p.tokens - num_prefix));
    p.graph = csr->view();
  }
  py::array grad_x =
      empty({grad.shape(0), static_cast<py::ssize_t>(p.tokens), grad.shape(2)}, numpy_name(p.grad.dtype));
  p.grad_x = grad_x.mutable_data();
  Error error;
  check(kernels_of(isa, threads).propagate_backward(p, kParallel, error), error);
  return grad_x;
}

py::tuple propagate_dense_of(const py::array& x_, const py::array& weight_, const py::array& index_kept,
                             const py::array& index_prop, const Optional& token_scales, double alpha,
                             int64_t num_prefix, int threads, const std::optional<std::string>& isa) {
  check_dim("x", x_, 3);
  const py::array x = with_rows(x_), weight = with_whole_strides(weight_);
  PropagateDenseParams p;
  p.x = rows_of(x, floating("x", x));
  p.batch = x.shape(0);
  p.tokens = x.shape(1);
  p.channels = x.shape(2);
  p.prefix = num_prefix;
  check_range("num_prefix", num_prefix, 0, p.tokens);
  const py::ssize_t count = static_cast<py::ssize_t>(p.tokens - num_prefix);
  check_shape("weight", weight, {x.shape(0), count, count});
  p.weight = weight.data();
  p.weight_dtype = floating("weight", weight);
  strides_of(weight, p.stride_weight);
  const Selection selection(index_kept, index_prop, x.shape(0));
  selection.set(p);
  p.alpha = alpha;
  py::array scales_holder;
  p.token_scales = vector_of("token_scales", token_scales, {x.shape(0), x.shape(1)}, true, scales_holder);
  const py::ssize_t kept = static_cast<py::ssize_t>(p.kept), rows_out = static_cast<py::ssize_t>(num_prefix) + kept;
  py::array x_out = empty({x.shape(0), rows_out, x.shape(2)}, numpy_name(p.x.dtype));
  py::array weight_out = empty({x.shape(0), kept, kept}, numpy_name(p.weight_dtype));
  py::array scales_out =
      token_scales ? empty({x.shape(0), rows_out}, numpy_name(p.token_scales.dtype)) : empty({0}, "float32");
  p.x_out = x_out.mutable_data();
  p.weight_out = weight_out.mutable_data();
  p.scales_out = scales_out.mutable_data();
  Error error;
  check(kernels_of(isa, threads).propagate_dense(p, kParallel, error), error);
  return py::make_tuple(x_out, weight_out, scales_out);
}

py::tuple build_graph_of(const py::array& x_, int64_t height, int64_t width, const std::string& graph_type,
                         int64_t num_neighbours, int64_t num_prefix, const std::string& semantics, int threads,
                         const std::optional<std::string>& isa) {
  check_dim("x", x_, 3);
  const py::array x = with_rows(x_);
  GraphParams p;
  p.x = rows_of(x, floating("x", x));
  p.batch = x.shape(0);
  p.tokens = x.shape(1);
  p.channels = x.shape(2);
  p.prefix = num_prefix;
  check_range("num_prefix", num_prefix, 0, p.tokens);
  const int64_t count = p.tokens - num_prefix;
  check_range("height", height, 0, std::numeric_limits<int32_t>::max());
  check_range("width", width, 0, std::numeric_limits<int32_t>::max());
  check_range("height * width", height * width, count, count);
  check_range("num_neighbours", num_neighbours, 0, std::max<int64_t>(count - 1, 0));
  p.height = height;
  p.width = width;
  p.type = option<GraphType>("graph_type", graph_type, parse);
  p.neighbours = graph_neighbours(count, num_neighbours, num_prefix, is_paper(semantics));
  p.capacity = graph_capacity(height, width, p.type, p.neighbours);
  check_range("the number of edges", p.capacity, 0, std::numeric_limits<int32_t>::max());
  py::array_t<int32_t> indptr(Shape{x.shape(0), static_cast<py::ssize_t>(count + 1)});
  py::array_t<int32_t> indices(Shape{x.shape(0), static_cast<py::ssize_t>(p.capacity)});
  py::array_t<float> values(Shape{x.shape(0), static_cast<py::ssize_t>(p.capacity)});
  p.indptr = indptr.mutable_data();
  p.indices = indices.mutable_data();
  p.values = values.mutable_data();
  kernels_of(isa, threads).build_graph(p, kParallel);
  return py::make_tuple(indptr, indices, values);
}

std::vector<std::string> isas(bool runnable) {
  std::vector<std::string> names;
  bool runs = false;
  for (int i = 0; const char* name = isa_name(i, &runs); ++i) {
    if (runs || !runnable) names.emplace_back(name);
  }
  return names;
}

std::vector<std::string> cuda_architectures() {
  std::vector<std::string> names;
  std::istringstream list(GTP_CUDA_ARCHS);
  for (std::string name; std::getline(list, name, ',');) {
    if (!name.empty()) names.push_back(name);
  }
  return names;
}

py::dict build_info() {
  constexpr unsigned long long target = GTP_TORCH_TARGET_VERSION;
  py::dict info;
  info["version"] = GTP_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["isas"] = isas(false);
  info["isa"] = kernels().isa;
  info["cuda_archs"] = cuda_architectures();
  info["torch_target"] = std::to_string(target >> 56) + "." + std::to_string(target >> 48 & 255);
  return info;
}

}  // namespace
}  // namespace gtp

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and the raw CPU routines of gtp_kernels over NumPy arrays.";
  m.def("build_info", &gtp::build_info,
        "version, compiler, isas (compiled), isa (chosen), cuda_archs, torch_target (the oldest torch it loads into)");
  m.def("isas", [] { return gtp::isas(true); }, "The compiled instruction sets that this machine runs, worst first.");
  m.def("attention_with_scores", &gtp::attention_with_scores, "q"_a, "k"_a, "v"_a, "token_scales"_a = py::none(),
        "sparsity"_a = 1.0, "scale"_a = py::none(), "semantics"_a = "official", py::kw_only(), "force_miss"_a = false,
        "threads"_a = 1, "isa"_a = py::none());
  m.def("attention_with_scores_backward", &gtp::attention_with_scores_backward, "grad_out"_a, "q"_a, "k"_a, "v"_a,
        "token_scales"_a = py::none(), "sparsity"_a = 1.0, "scale"_a = py::none(), "semantics"_a = "official",
        py::kw_only(), "force_miss"_a = false, "threads"_a = 1, "isa"_a = py::none());
  m.def("token_importance", &gtp::importance_of, "diag"_a, "colsum"_a, "cls_row"_a, "standard"_a = "MixedAttnMax",
        "num_prefix"_a = 1, "semantics"_a = "official", py::kw_only(), "threads"_a = 1);
  m.def("select_tokens", &gtp::select_of, "importance"_a, "num_prop"_a, "num_prefix"_a = 1, "order"_a = "grid",
        py::kw_only(), "threads"_a = 1);
  m.def("propagate", &gtp::propagate_of, "x"_a, "graph"_a, "index_kept"_a, "index_prop"_a,
        "token_scales"_a = py::none(), "standard"_a = "GraphProp", "alpha"_a = 0.1, "num_prefix"_a = 1, py::kw_only(),
        "threads"_a = 1, "isa"_a = py::none());
  m.def("propagate_backward", &gtp::propagate_backward_of, "grad"_a, "graph"_a, "index_kept"_a, "index_prop"_a,
        "standard"_a = "GraphProp", "alpha"_a = 0.1, "num_prefix"_a = 1, py::kw_only(), "threads"_a = 1,
        "isa"_a = py::none());
  m.def("propagate_dense", &gtp::propagate_dense_of, "x"_a, "weight"_a, "index_kept"_a, "index_prop"_a,
        "token_scales"_a = py::none(), "alpha"_a = 0.1, "num_prefix"_a = 1, py::kw_only(), "threads"_a = 1,
        "isa"_a = py::none());
  m.def("residual_propagate_norm", &gtp::residual_propagate_norm, "x"_a, "branch"_a, "layer_scale"_a, "graph"_a,
        "index_kept"_a, "index_prop"_a, "token_scales"_a = py::none(), "norm_weight"_a = py::none(),
        "norm_bias"_a = py::none(), "norm_eps"_a = 1e-6, "norm"_a = "layer", "standard"_a = "GraphProp",
        "alpha"_a = 0.1, "num_prefix"_a = 1, py::kw_only(), "threads"_a = 1, "isa"_a = py::none());
  m.def("build_graph", &gtp::build_graph_of, "x"_a, "height"_a, "width"_a, "graph_type"_a = "Mixed",
        "num_neighbours"_a = 8, "num_prefix"_a = 1, "semantics"_a = "official", py::kw_only(), "threads"_a = 1,
        "isa"_a = py::none());
}
