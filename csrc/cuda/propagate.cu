// propagate and select_propagate: the kernel for a row length, the blocks, the shared memory.

#include "cuda/propagate.cuh"

#include "cuda/launch.cuh"

namespace gtp {
namespace cuda {
namespace {

bool is_multiple(int64_t value, int64_t of) {
  return value % of == 0;
}

// Whether every row begins at a multiple of four elements.
bool in_fours(const Rows& rows, int64_t batch, int64_t tokens) {
  if (!rows.data) return true;
  return is_multiple(reinterpret_cast<intptr_t>(rows.data), 4 * size_of(rows.dtype)) &&
         (batch == 1 || is_multiple(rows.stride_b, 4)) && (tokens == 1 || is_multiple(rows.stride_n, 4));
}

// How many times 128 channels a lane holds in registers; 0: the kernel for every other row.
int chunks_of(const PropagateParams& p) {
  const int64_t four = 4 * size_of(p.out_dtype);
  const bool aligned = is_multiple(p.channels, 4) && in_fours(p.x, p.batch, p.tokens) &&
                       in_fours(p.branch, p.batch, p.tokens) &&
                       is_multiple(reinterpret_cast<intptr_t>(p.x_out), four) &&
                       (p.norm == Norm::None || is_multiple(reinterpret_cast<intptr_t>(p.normed), four));
  if (!aligned || p.channels == 0) return 0;
  for (int chunks : {2, 3, 4, 6, 8, 12, 16}) {
    if (p.channels <= 128 * chunks) return chunks < 16 || p.out_dtype != DType::Float32 ? chunks : 0;
  }
  return 0;
}

bool check(const PropagateParams& p, Error& error) {
  const char* what = nullptr;
  const bool half = p.out_dtype == DType::BFloat16 || p.out_dtype == DType::Float16;
  if (p.out_dtype == DType::Float64 || p.x.dtype == DType::Float64 ||
      (p.branch.data && p.branch.dtype == DType::Float64)) {
    what = "takes no float64";
  } else if (half && (p.x.dtype != p.out_dtype || (p.branch.data && p.branch.dtype != p.out_dtype))) {
    what = "writes a half type only where x and branch have it";
  } else if (p.token_scales.data && p.token_scales.dtype != DType::Float32 && p.token_scales.dtype != DType::Float64) {
    what = "takes token_scales of float32 or float64";
  }
  if (!what) return true;
  std::snprintf(error.text, sizeof error.text, "the CUDA kernel propagate %s", what);
  return false;
}

// The parts of shared memory one after the other; `selected` tokens are chosen in the block.
StepLayout lay_out(const PropagateParams& p, int chunks, bool table, int64_t selected) {
  StepLayout layout;
  int64_t end = 0;
  const auto take = [&](bool used, int64_t bytes) {
    const int64_t begin = end;
    if (used) end += (bytes + 15) / 16 * 16;
    return static_cast<uint32_t>(begin);
  };
  layout.layer_scale = take(chunks > 0 && p.branch.data, 4 * p.channels);
  layout.weight = take(chunks > 0 && p.norm != Norm::None, 4 * p.channels);
  layout.bias = take(chunks > 0 && p.norm != Norm::None, 4 * p.channels);
  layout.leaver = take(table, 2 * p.graph.origins);
  layout.scratch = take(selected > 0, 64 * static_cast<int64_t>(sizeof(int)));
  layout.keys = take(selected > 0, 4 * padded_keys(selected));
  layout.order = take(selected > 0, 4 * selected);
  layout.bytes = end < 0x7fffffff ? static_cast<uint32_t>(end) : 0x7fffffffu;
  return layout;
}

// Blocks that work on one image: one row per warp, more where that leaves every multiprocessor its eight blocks.
void divide(StepParams& params, const Machine& m) {
  const int64_t rows = params.step.rows_out();
  const auto blocks = [&](int64_t per_warp) { return (rows + kStepWarps * per_warp - 1) / (kStepWarps * per_warp); };
  int64_t per_warp = 1;
  while (per_warp < 8 && params.step.batch * blocks(2 * per_warp) >= 8 * m.multiprocessors) per_warp *= 2;
  params.rows_per_block = kStepWarps * per_warp;
  params.blocks_per_image = static_cast<uint32_t>(blocks(per_warp));
}

bool prepare(StepParams& params, int64_t selected, Launch& l, int& chunks, Error& error) {
  Machine m;
  if (!check(params.step, error) || !machine(m, error)) return false;
  const PropagateParams& p = params.step;
  chunks = chunks_of(p);
  const bool walks = p.standard == Standard::GraphProp && p.prop > 0;
  // Rows are 16 bits wide in the table.
  const uint32_t limit = static_cast<uint32_t>(m.shared_bytes);
  params.table = walks && p.tokens < kStays && lay_out(p, chunks, true, selected).bytes <= limit;
  params.layout = lay_out(p, chunks, params.table, selected);
  divide(params, m);
  l.blocks_x = p.batch * params.blocks_per_image;
  l.threads = kStepThreads;
  l.shared_bytes = params.layout.bytes;
  if (params.layout.bytes > limit) return failed_launch(l, "a block has less shared memory", error);
  return true;
}

template <template <class, int> class Kernel, class T, class P>
bool launch_chunks(int chunks, const P& params, const Launch& l, void* stream, Error& error) {
  switch (chunks) {
    case 2:
      return launch(Kernel<T, 2>::function, params, l, stream, error);
    case 3:
      return launch(Kernel<T, 3>::function, params, l, stream, error);
    case 4:
      return launch(Kernel<T, 4>::function, params, l, stream, error);
    case 6:
      return launch(Kernel<T, 6>::function, params, l, stream, error);
    case 8:
      return launch(Kernel<T, 8>::function, params, l, stream, error);
    case 12:
      return launch(Kernel<T, 12>::function, params, l, stream, error);
    case 16:  // as many values of float32 are more than there are registers
      if constexpr (!kIsFloat<T>) return launch(Kernel<T, 16>::function, params, l, stream, error);
      [[fallthrough]];
    default:
      return launch(Kernel<T, 0>::function, params, l, stream, error);
  }
}

template <template <class, int> class Kernel, class P>
bool launch_step(int chunks, const P& params, const Launch& l, void* stream, Error& error) {
  switch (params.step.out_dtype) {
    case DType::BFloat16:
      return launch_chunks<Kernel, BFloat16>(chunks, params, l, stream, error);
    case DType::Float16:
      return launch_chunks<Kernel, Float16>(chunks, params, l, stream, error);
    default:
      return launch_chunks<Kernel, float>(chunks, params, l, stream, error);
  }
}

template <class T, int kChunks>
struct PropagateKernel {
  static constexpr auto function = propagate_kernel<T, kChunks>;
};
template <class T, int kChunks>
struct SelectPropagateKernel {
  static constexpr auto function = select_propagate_kernel<T, kChunks>;
};

}  // namespace

bool propagate(const PropagateParams& p, void* stream, Error& error) {
  StepParams params;
  params.step = p;
  Launch l{"propagate", 0};
  int chunks = 0;
  if (!prepare(params, 0, l, chunks, error)) return false;
  return launch_step<PropagateKernel>(chunks, params, l, stream, error);
}

bool select_propagate(const SelectPropagateParams& p, void* stream, Error& error) {
  SelectStepParams params;
  params.step = p.step;
  params.importance = p.importance;
  params.by_index = p.by_index;
  params.index_kept = p.index_kept;
  params.index_prop = p.index_prop;
  Launch l{"select_propagate", 0};
  if (p.importance.dtype != DType::Float32) {
    std::snprintf(error.text, sizeof error.text, "the CUDA kernel select_propagate takes scores of float32 only");
    return false;
  }
  int chunks = 0;
  if (!prepare(params, p.step.tokens - p.step.prefix, l, chunks, error)) return false;
  return launch_step<SelectPropagateKernel>(chunks, params, l, stream, error);
}

}  // namespace cuda
}  // namespace gtp
