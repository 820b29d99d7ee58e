// propagate, its form for live edges and select_propagate: the kernel for a row length, the blocks, the shared memory.

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

// Whether a kernel that holds up to 128 * chunks channels in registers takes the rows.
bool in_registers(const PropagateParams& p, int chunks) {
  const int64_t four = 4 * size_of(p.out_dtype);
  return p.channels > 0 && p.channels <= 128 * chunks && is_multiple(p.channels, 4) &&
         in_fours(p.x, p.batch, p.tokens) && in_fours(p.branch, p.batch, p.tokens) &&
         is_multiple(reinterpret_cast<intptr_t>(p.x_out), four) &&
         (p.norm == Norm::None || is_multiple(reinterpret_cast<intptr_t>(p.normed), four));
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
StepLayout lay_out(const PropagateParams& p, bool registers, bool table, int64_t selected) {
  StepLayout layout;
  int64_t end = 0;
  const auto take = [&](bool used, int64_t bytes) {
    const int64_t begin = end;
    if (used) end += (bytes + 15) / 16 * 16;
    return static_cast<uint32_t>(begin);
  };
  layout.layer_scale = take(registers && p.branch.data, 4 * p.channels);
  layout.weight = take(registers && p.norm != Norm::None, 4 * p.channels);
  layout.bias = take(registers && p.norm != Norm::None, 4 * p.channels);
  layout.leaver = take(table, 2 * p.graph.origins);
  layout.scratch = take(selected > 0, 64 * static_cast<int64_t>(sizeof(int)));
  layout.keys = take(selected > 0, 4 * padded_keys(selected));
  layout.order = take(selected > 0, 4 * selected);
  layout.bytes = end < 0x7fffffff ? static_cast<uint32_t>(end) : 0x7fffffffu;
  return layout;
}

// Blocks that work on one image: one row per warp, more where that leaves every multiprocessor `least` blocks. Before
// its rows a warp prepares as much as half a row is to compute, and with the selection as much as two (by the
// instructions of the compiled code; not measured).
void divide(StepParams& params, const Machine& m, int least) {
  const int64_t rows = params.step.rows_out();
  const auto blocks = [&](int64_t per_warp) { return (rows + kStepWarps * per_warp - 1) / (kStepWarps * per_warp); };
  int64_t per_warp = 1;
  while (per_warp < 8 && params.step.batch * blocks(2 * per_warp) >= least * m.multiprocessors) per_warp *= 2;
  params.rows_per_block = static_cast<int>(kStepWarps * per_warp);
  params.blocks_per_image = static_cast<int>(blocks(per_warp));
}

bool prepare(StepParams& params, int64_t selected, bool registers, Launch& l, Error& error) {
  Machine m;
  if (!check(params.step, error) || !machine(m, error)) return false;
  const PropagateParams& p = params.step;
  const bool walks = p.standard == Standard::GraphProp && p.prop > 0;
  // Rows are 16 bits wide in the table.
  const uint32_t limit = static_cast<uint32_t>(m.shared_bytes);
  params.table = walks && p.tokens < kStays && lay_out(p, registers, true, selected).bytes <= limit;
  params.layout = lay_out(p, registers, params.table, selected);
  divide(params, m, selected > 0 ? 4 : 8);
  params.per_channel = p.channels > 0 ? 1.f / static_cast<float>(p.channels) : 1.f;
  l.blocks_x = p.batch * params.blocks_per_image;
  l.threads = kStepThreads;
  l.shared_bytes = params.layout.bytes;
  if (params.layout.bytes > limit) return failed_launch(l, "a block has less shared memory", error);
  return true;
}

// The kernel of the fewest chunks of kFirst, kOthers that hold a row, and where none does that of any row.
template <template <class, int> class Kernel, class T, int kFirst, int... kOthers, class P>
bool launch_rows(bool registers, const P& params, const Launch& l, void* stream, Error& error) {
  if (registers && params.step.channels <= 128 * kFirst) {
    return launch(Kernel<T, kFirst>::function, params, l, stream, error);
  }
  if constexpr (sizeof...(kOthers) > 0) {
    return launch_rows<Kernel, T, kOthers...>(registers, params, l, stream, error);
  } else {
    return launch(Kernel<T, 0>::function, params, l, stream, error);
  }
}

template <class T, int kChunks>
struct PropagateKernel {
  static constexpr auto function = propagate_kernel<T, kChunks>;
};
template <class T, int kChunks>
struct MergeKernel {
  static constexpr auto function = merge_kernel<T, kChunks>;
};
template <class T, int kChunks>
struct SelectPropagateKernel {
  static constexpr auto function = select_propagate_kernel<T, kChunks>;
};

// Rows of 16 chunks of float32 are more than there are registers.
int most_chunks(const PropagateParams& p) {
  return p.out_dtype == DType::Float32 ? 12 : 16;
}
constexpr int kMostChunksOfFew = 12;

// Fewer lengths than of propagate: each is as long to compile, and a shorter row leaves registers unused only.
bool merge(const PropagateParams& p, void* stream, Error& error) {
  StepParams params;
  params.step = p;
  Launch l{"live_merge", 0};
  const bool registers = in_registers(p, kMostChunksOfFew);
  if (!prepare(params, 0, registers, l, error)) return false;
  switch (p.out_dtype) {
    case DType::BFloat16:
      return launch_rows<MergeKernel, BFloat16, 3, 6, 12>(registers, params, l, stream, error);
    case DType::Float16:
      return launch_rows<MergeKernel, Float16, 3, 6, 12>(registers, params, l, stream, error);
    default:
      return launch_rows<MergeKernel, float, 3, 6, 12>(registers, params, l, stream, error);
  }
}

}  // namespace

bool propagate(const PropagateParams& p, void* stream, Error& error) {
  if (p.standard == Standard::Merge) return merge(p, stream, error);
  StepParams params;
  params.step = p;
  Launch l{"propagate", 0};
  const bool registers = in_registers(p, most_chunks(p));
  if (!prepare(params, 0, registers, l, error)) return false;
  switch (p.out_dtype) {
    case DType::BFloat16:
      return launch_rows<PropagateKernel, BFloat16, 2, 3, 4, 6, 8, 12, 16>(registers, params, l, stream, error);
    case DType::Float16:
      return launch_rows<PropagateKernel, Float16, 2, 3, 4, 6, 8, 12, 16>(registers, params, l, stream, error);
    default:
      return launch_rows<PropagateKernel, float, 2, 3, 4, 6, 8, 12>(registers, params, l, stream, error);
  }
}

bool takes_select_propagate(const SelectPropagateParams& p, bool& takes, Error& error) {
  takes = false;
  Machine m;
  if (!machine(m, error)) return false;
  const bool registers = in_registers(p.step, kMostChunksOfFew);
  // Blocks come with rows, and would not make the choice without any. A norm's sums have another order where the row is
  // in registers in one kernel only.
  if (p.step.rows_out() == 0 || p.importance.dtype != DType::Float32 ||
      registers != in_registers(p.step, most_chunks(p.step)))
    return true;
  const int64_t selected = p.step.tokens - p.step.prefix;
  takes = lay_out(p.step, registers, false, selected).bytes <= static_cast<uint32_t>(m.shared_bytes);
  return true;
}

bool select_propagate(const SelectPropagateParams& p, void* stream, Error& error) {
  if (p.importance.dtype != DType::Float32) {
    std::snprintf(error.text, sizeof error.text, "the CUDA kernel select_propagate takes scores of float32 only");
    return false;
  }
  SelectStepParams params;
  params.step = p.step;
  params.importance = p.importance;
  params.by_index = p.by_index;
  params.index_kept = p.index_kept;
  params.index_prop = p.index_prop;
  Launch l{"select_propagate", 0};
  const bool registers = in_registers(p.step, kMostChunksOfFew);
  if (!prepare(params, p.step.tokens - p.step.prefix, registers, l, error)) return false;
  switch (p.step.out_dtype) {
    case DType::BFloat16:
      return launch_rows<SelectPropagateKernel, BFloat16, 3, 6, 12>(registers, params, l, stream, error);
    case DType::Float16:
      return launch_rows<SelectPropagateKernel, Float16, 3, 6, 12>(registers, params, l, stream, error);
    default:
      return launch_rows<SelectPropagateKernel, float, 3, 6, 12>(registers, params, l, stream, error);
  }
}

}  // namespace cuda
}  // namespace gtp
