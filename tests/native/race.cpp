// Every kernel of every instruction set that the machine runs, on one thread and on several: equal to the bit, and
// nothing for ThreadSanitizer to report. `make sanitize` builds and runs it; seconds, and no Python.
//
// Each array ends at a page that may not be touched, because GCC's sanitizers do not see what masked intrinsics read
// and write. Outputs start as other garbage on every run, so that an element left unwritten shows as a difference.
// Arrays are never freed.

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace {

using namespace gtp;

constexpr size_t kPage = 4096;

[[noreturn]] void fail(const std::string& text) {
  std::fprintf(stderr, "race: %s\n", text.c_str());
  std::exit(1);
}

class Array {
 public:
  explicit Array(int64_t bytes) : size(static_cast<size_t>(bytes)) {
    const size_t room = (size + kPage - 1) / kPage * kPage;
    void* block = mmap(nullptr, room + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED || mprotect(static_cast<char*>(block) + room, kPage, PROT_NONE)) fail("out of memory");
    data = static_cast<char*>(block) + (room - size);
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
  char* data;
  const size_t size;
};

uint64_t state = 1;

uint32_t draw() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 33);
}

// Values of magnitude 0.5 to 2, of either sign.
Array random_array(DType dtype, int64_t count) {
  Array array(count * size_of(dtype));
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = draw(), sign = bits & 1;
    if (dtype == DType::BFloat16)
      array.as<uint16_t>()[i] = static_cast<uint16_t>(sign << 15 | (0x3f00 + (bits >> 8 & 0xff)));
    if (dtype == DType::Float16)
      array.as<uint16_t>()[i] = static_cast<uint16_t>(sign << 15 | (0x3800 + (bits >> 8 & 0x7ff)));
    const double value = (sign ? -1 : 1) * (0.5 + 1.5 * (bits >> 8) / (1 << 23));
    if (dtype == DType::Float32) array.as<float>()[i] = static_cast<float>(value);
    if (dtype == DType::Float64) array.as<double>()[i] = value;
  }
  return array;
}

// Sizes of token scales: positive.
Array random_scales(int64_t count) {
  Array array = random_array(DType::Float32, count);
  for (int64_t i = 0; i < count; ++i) array.as<float>()[i] = std::abs(array.as<float>()[i]);
  return array;
}

const Parallel kSerial = {[](int64_t count, int64_t, Parallel::Body body, void* context) { body(context, 0, count); }};

int threads = 1;

// Three times as many ranges as threads, dealt in turn: ranges of one thread are not neighbours, and it uses its
// scratch again.
const Parallel kThreads = {[](int64_t count, int64_t, Parallel::Body body, void* context) {
  const int64_t ranges = std::min<int64_t>(count, 3 * threads);
  std::vector<std::thread> pool;
  for (int64_t t = 0; t < std::min<int64_t>(ranges, threads); ++t) {
    pool.emplace_back([=] {
      for (int64_t r = t; r < ranges; r += threads) body(context, count * r / ranges, count * (r + 1) / ranges);
    });
  }
  for (std::thread& thread : pool) thread.join();
}};

struct Case {
  std::string name;
  std::vector<Array> outputs;
  std::function<bool(const Kernels&, const Parallel&, Error&)> run;
};

const char* const kTypes[] = {"float32", "float64", "bfloat16", "float16"};
const DType kDTypes[] = {DType::Float32, DType::Float64, DType::BFloat16, DType::Float16};

Array output(Case& made, int64_t bytes) {
  made.outputs.emplace_back(bytes);
  return made.outputs.back();
}

void contiguous(int64_t (&strides)[4], int64_t heads, int64_t tokens, int64_t size) {
  const int64_t values[4] = {heads * tokens * size, tokens * size, size, 1};
  std::copy(values, values + 4, strides);
}

void add_attention(std::vector<Case>& cases, DType dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t size,
                   double sparsity, bool force_miss) {
  const int64_t scores = batch * heads * tokens, width = dtype == DType::Float64 ? 8 : 4;
  AttentionParams p;
  p.q = random_array(dtype, scores * size).data;
  p.k = random_array(dtype, scores * size).data;
  p.v = random_array(dtype, scores * size).data;
  contiguous(p.stride_q, heads, tokens, size);
  contiguous(p.stride_k, heads, tokens, size);
  contiguous(p.stride_v, heads, tokens, size);
  p.dtype = dtype;
  p.token_scales = {random_scales(batch * tokens).data, DType::Float32};
  p.batch = batch;
  p.heads = heads;
  p.tokens = tokens;
  p.head_size = size;
  p.scale = 0.5;
  p.rank = threshold_rank(tokens, sparsity, false);
  p.force_miss = force_miss;
  Case made{"attention", {}, {}};
  p.out = output(made, scores * size * size_of(dtype)).data;
  p.diag = output(made, scores * width).data;
  p.colsum = output(made, scores * width).data;
  p.cls_row = output(made, scores * width).data;
  made.name += " N=" + std::to_string(tokens) + " d=" + std::to_string(size) + " rank=" + std::to_string(p.rank) +
               (force_miss ? " missed" : "");
  made.run = [p](const Kernels& kernels, const Parallel& parallel, Error&) {
    kernels.attention(p, parallel);
    return true;
  };
  AttentionBackwardParams b;
  b.attention = p;
  b.grad_out = random_array(dtype, scores * size).data;
  contiguous(b.stride_grad_out, heads, tokens, size);
  Case backward{"backward of " + made.name, {}, {}};
  b.grad_q = output(backward, scores * size * size_of(dtype)).data;
  b.grad_k = output(backward, scores * size * size_of(dtype)).data;
  b.grad_v = output(backward, scores * size * size_of(dtype)).data;
  backward.run = [b](const Kernels& kernels, const Parallel& parallel, Error&) {
    kernels.attention_backward(b, parallel);
    return true;
  };
  cases.push_back(std::move(made));
  cases.push_back(std::move(backward));
}

// What the kernels after the attention share: tokens on a grid, their graph, and who leaves.
struct Problem {
  static constexpr int64_t batch = 3, height = 9, width = 8, prefix = 1, count = height * width,
                           tokens = prefix + count, channels = 300, prop = 11, kept = count - prop, neighbours = 5;
  Array x, indptr, indices, values, token, index_kept, index_prop, scales;
  int64_t capacity;

  explicit Problem(DType dtype)
      : x(random_array(dtype, batch * tokens * channels)),
        indptr(batch * (count + 1) * 4),
        indices(batch * graph_capacity(height, width, GraphType::Mixed, neighbours) * 4),
        values(batch * graph_capacity(height, width, GraphType::Mixed, neighbours) * 4),
        token(batch * count * 4),
        index_kept(batch * kept * 8),
        index_prop(batch * prop * 8),
        scales(random_scales(batch * tokens)),
        capacity(graph_capacity(height, width, GraphType::Mixed, neighbours)) {
    for (int64_t i = 0; i < batch * count; ++i) token.as<int32_t>()[i] = static_cast<int32_t>(count - 1 - i % count);
    kernels_for("baseline").build_graph(graph(dtype, GraphType::Mixed), kSerial);
    const Array importance = random_array(DType::Float32, batch * count);
    select_tokens(selection(importance, DType::Float32, index_kept, index_prop, false), kSerial);
  }

  GraphParams graph(DType dtype, GraphType type) const {
    GraphParams p;
    p.x = rows(x, dtype, tokens);
    p.batch = batch;
    p.tokens = tokens;
    p.channels = channels;
    p.prefix = prefix;
    p.height = height;
    p.width = width;
    p.type = type;
    p.neighbours = neighbours;
    p.capacity = capacity;
    p.indptr = indptr.as<int32_t>();
    p.indices = indices.as<int32_t>();
    p.values = values.as<float>();
    return p;
  }

  static Rows rows(const Array& array, DType dtype, int64_t count) {
    return {array.data, dtype, count * channels, channels};
  }

  static SelectParams selection(const Array& importance, DType dtype, const Array& kept_to, const Array& prop_to,
                                bool by_index) {
    SelectParams p;
    p.importance = importance.data;
    p.dtype = dtype;
    p.batch = batch;
    p.count = count;
    p.prop = prop;
    p.prefix = prefix;
    p.by_index = by_index;
    p.index_kept = kept_to.as<int64_t>();
    p.index_prop = prop_to.as<int64_t>();
    return p;
  }

  // The members that the three forms of propagate have in common.
  template <class P>
  P common() const {
    P p;
    p.batch = batch;
    p.tokens = tokens;
    p.channels = channels;
    p.prefix = prefix;
    p.kept = kept;
    p.prop = prop;
    p.index_kept = index_kept.as<int64_t>();
    p.index_prop = index_prop.as<int64_t>();
    p.alpha = 0.3;
    return p;
  }

  GraphView view() const {
    return {indptr.as<int32_t>(), indices.as<int32_t>(), values.as<float>(), token.as<int32_t>(), count, capacity};
  }
};

void add_graph(std::vector<Case>& cases, const Problem& problem, DType dtype, GraphType type) {
  GraphParams p = problem.graph(dtype, type);
  p.capacity = graph_capacity(p.height, p.width, type, p.neighbours);
  Case made{"build_graph " + std::to_string(static_cast<int>(type)), {}, {}};
  p.indptr = output(made, p.batch * (Problem::count + 1) * 4).as<int32_t>();
  p.indices = output(made, p.batch * p.capacity * 4).as<int32_t>();
  p.values = output(made, p.batch * p.capacity * 4).as<float>();
  made.run = [p](const Kernels& kernels, const Parallel& parallel, Error&) {
    kernels.build_graph(p, parallel);
    return true;
  };
  cases.push_back(std::move(made));
}

void add_propagate(std::vector<Case>& cases, const Problem& problem, DType dtype, Standard standard, Norm norm) {
  auto p = problem.common<PropagateParams>();
  p.x = Problem::rows(problem.x, dtype, p.tokens);
  if (norm != Norm::None)
    p.branch = Problem::rows(random_array(dtype, p.batch * p.tokens * p.channels), dtype, p.tokens);
  const Vector parameters = {random_array(DType::Float32, p.channels).data, DType::Float32};
  p.layer_scale = p.norm_weight = parameters;
  p.graph = problem.view();
  p.standard = standard;
  p.norm = norm;
  p.norm_eps = 1e-6;
  p.token_scales = {problem.scales.data, DType::Float32};
  p.out_dtype = dtype;
  const int64_t rows = p.batch * p.rows_out();
  Case made{
      "propagate " + std::to_string(static_cast<int>(standard)) + " norm " + std::to_string(static_cast<int>(norm)),
      {},
      {}};
  p.x_out = output(made, rows * p.channels * size_of(dtype)).data;
  p.normed = norm == Norm::None ? nullptr : output(made, rows * p.channels * size_of(dtype)).data;
  p.token_out = standard == Standard::GraphProp ? output(made, p.batch * p.kept * 4).as<int32_t>() : nullptr;
  p.scales_out = output(made, rows * 4).data;
  made.run = [p](const Kernels& kernels, const Parallel& parallel, Error& error) {
    return kernels.propagate(p, parallel, error);
  };
  cases.push_back(std::move(made));
}

void add_backward(std::vector<Case>& cases, const Problem& problem, DType dtype, Standard standard) {
  auto p = problem.common<PropagateBackwardParams>();
  const int64_t rows_out = p.prefix + p.kept + (standard == Standard::Mean);
  p.grad = Problem::rows(random_array(dtype, p.batch * rows_out * p.channels), dtype, rows_out);
  p.graph = problem.view();
  p.standard = standard;
  Case made{"propagate_backward " + std::to_string(static_cast<int>(standard)), {}, {}};
  p.grad_x = output(made, p.batch * p.tokens * p.channels * size_of(dtype)).data;
  made.run = [p](const Kernels& kernels, const Parallel& parallel, Error& error) {
    return kernels.propagate_backward(p, parallel, error);
  };
  cases.push_back(std::move(made));
}

void add_dense(std::vector<Case>& cases, const Problem& problem, DType dtype) {
  auto p = problem.common<PropagateDenseParams>();
  constexpr int64_t count = Problem::count;
  p.x = Problem::rows(problem.x, dtype, p.tokens);
  p.weight = random_array(dtype, p.batch * count * count).data;
  p.weight_dtype = dtype;
  p.stride_weight[0] = count * count;
  p.stride_weight[1] = count;
  p.stride_weight[2] = 1;
  p.token_scales = {problem.scales.data, DType::Float32};
  const int64_t rows_out = p.prefix + p.kept;
  Case made{"propagate_dense", {}, {}};
  p.x_out = output(made, p.batch * rows_out * p.channels * size_of(dtype)).data;
  p.weight_out = output(made, p.batch * p.kept * p.kept * size_of(dtype)).data;
  p.scales_out = output(made, p.batch * rows_out * 4).data;
  made.run = [p](const Kernels& kernels, const Parallel& parallel, Error& error) {
    return kernels.propagate_dense(p, parallel, error);
  };
  cases.push_back(std::move(made));
}

void add_selection(std::vector<Case>& cases, DType dtype) {
  // So many heads that one image is a task of its own.
  constexpr int64_t batch = Problem::batch, heads = 600, tokens = Problem::tokens;
  ImportanceParams p;
  p.diag = random_array(dtype, batch * heads * tokens).data;
  p.colsum = random_array(dtype, batch * heads * tokens).data;
  p.cls_row = random_array(dtype, batch * heads * tokens).data;
  p.dtype = dtype;
  p.batch = batch;
  p.heads = heads;
  p.tokens = tokens;
  p.prefix = Problem::prefix;
  p.subtract_diag = true;
  Case importance{"token_importance", {}, {}};
  p.importance = output(importance, batch * Problem::count * size_of(dtype)).data;
  importance.run = [p](const Kernels&, const Parallel& parallel, Error&) {
    token_importance(p, parallel);
    return true;
  };
  cases.push_back(std::move(importance));
  for (const bool by_index : {false, true}) {
    Case made{by_index ? "select_tokens grid" : "select_tokens importance", {}, {}};
    const Array kept = output(made, batch * Problem::kept * 8), prop = output(made, batch * Problem::prop * 8);
    const SelectParams s = Problem::selection(random_array(dtype, batch * Problem::count), dtype, kept, prop, by_index);
    made.run = [s](const Kernels&, const Parallel& parallel, Error&) {
      select_tokens(s, parallel);
      return true;
    };
    cases.push_back(std::move(made));
  }
}

std::vector<Case> cases_of(DType dtype) {
  std::vector<Case> cases;
  for (const bool force_miss : {false, true}) add_attention(cases, dtype, 2, 3, 70, 20, 0.6, force_miss);
  add_attention(cases, dtype, 2, 3, 70, 64, 1.0, false);
  add_attention(cases, dtype, 1, 3, 197, 64, 0.6, false);
  add_attention(cases, dtype, 1, 1, 515, 16, 0.6, false);
  add_attention(cases, dtype, 3, 2, 5, 9, 0.6, false);
  // Beyond 1,536 tokens the map is computed again in every sweep.
  if (dtype == DType::Float32 || dtype == DType::BFloat16) add_attention(cases, dtype, 1, 2, 1540, 8, 0.6, false);
  const Problem problem(dtype);
  for (const GraphType type : {GraphType::Spatial, GraphType::Semantic, GraphType::Mixed}) {
    add_graph(cases, problem, dtype, type);
  }
  for (const Standard standard : {Standard::None, Standard::Mean, Standard::GraphProp}) {
    for (const Norm norm : {Norm::None, Norm::Layer, Norm::Rms}) add_propagate(cases, problem, dtype, standard, norm);
    add_backward(cases, problem, dtype, standard);
  }
  add_dense(cases, problem, dtype);
  if (dtype == DType::Float32 || dtype == DType::Float64) add_selection(cases, dtype);
  return cases;
}

std::vector<std::string> run(const Case& made, const Kernels& kernels, const Parallel& parallel, int garbage,
                             const std::string& where) {
  for (const Array& array : made.outputs) std::memset(array.data, garbage, array.size);
  Error error;
  if (!made.run(kernels, parallel, error)) fail(where + ": " + error.text);
  std::vector<std::string> results;
  for (const Array& array : made.outputs) results.emplace_back(array.data, array.size);
  return results;
}

}  // namespace

int main() {
  int compared = 0;
  for (int type = 0; type < 4; ++type) {
    const std::vector<Case> cases = cases_of(kDTypes[type]);
    bool runs = false;
    for (int i = 0; const char* isa = isa_name(i, &runs); ++i) {
      if (!runs) continue;
      for (const Case& made : cases) {
        const std::string where = made.name + ", " + kTypes[type] + ", " + isa;
        const std::vector<std::string> one = run(made, kernels_for(isa), kSerial, 0xff, where);
        for (const int many : {3, 64}) {
          threads = many;
          const std::vector<std::string> results = run(made, kernels_for(isa), kThreads, 0x5a + many, where);
          if (results != one) fail(where + ": another result on " + std::to_string(many) + " threads");
          ++compared;
        }
      }
    }
  }
  std::printf("race: %d runs on 3 and 64 threads equal those on one\n", compared);
  return 0;
}
