// build_graph: four launches where similarities are asked for, two for the grid alone.
#include "cuda/graph.cuh"

namespace gtp {
namespace cuda {
namespace {

using namespace graph;

Task task_of(const GraphParams& p) {
  Task task;
  task.params = p;
  task.count = static_cast<int32_t>(p.height * p.width);
  task.listed = p.type == GraphType::Spatial || task.count == 0 ? 0 : static_cast<int32_t>(p.neighbours);
  const int64_t chunks = (p.channels + kChunk - 1) / kChunk;
  task.padded = static_cast<int32_t>((chunks > 0 ? chunks : 1) * kChunk);
  return task;
}

int64_t unit_bytes(const Task& task) {
  return task.params.batch * task.count * task.padded * static_cast<int64_t>(sizeof(float));
}

bool launch_unit_rows(const Task& task, const Launch& l, void* stream, Error& error) {
  switch (task.params.x.dtype) {
    case DType::BFloat16:
      return launch(unit_rows<BFloat16>, task, l, stream, error);
    case DType::Float16:
      return launch(unit_rows<Float16>, task, l, stream, error);
    default:
      return launch(unit_rows<float>, task, l, stream, error);
  }
}

bool launch_nearest(Task& task, void* stream, Error& error) {
  Machine device;
  if (!machine(device, error)) return false;
  const int64_t batch = task.params.batch;
  // Half the rows in a block where whole ones would leave multiprocessors without work.
  int64_t warps = kWarps;
  if (batch * ((task.count + warps * kOwnRows - 1) / (warps * kOwnRows)) < device.multiprocessors) warps /= 2;
  task.tiles = static_cast<int32_t>((task.count + warps * kOwnRows - 1) / (warps * kOwnRows));
  const bool one_slot = task.listed <= kLanes;
  const Launch l{"nearest_rows", batch * task.tiles, 1, static_cast<int>(warps * kLanes),
                 static_cast<size_t>(nearest_shared(warps, one_slot ? 1 : 2))};
  return launch(one_slot ? nearest_rows<1> : nearest_rows<2>, task, l, stream, error);
}

}  // namespace

size_t build_graph_workspace(const GraphParams& p) {
  const Task task = task_of(p);
  if (task.listed == 0) return 0;
  return static_cast<size_t>(unit_bytes(task) +
                             p.batch * task.count * task.listed * static_cast<int64_t>(sizeof(int32_t)));
}

bool build_graph(const GraphParams& p, void* workspace, void* stream, Error& error) {
  if (p.x.dtype == DType::Float64) {
    std::snprintf(error.text, sizeof error.text,
                  "build_graph: x must be float32, bfloat16 or float16 on this backend, not float64");
    return false;
  }
  Task task = task_of(p);
  if (task.listed > 0) {
    task.unit = static_cast<float*>(workspace);
    task.nearest = reinterpret_cast<int32_t*>(static_cast<unsigned char*>(workspace) + unit_bytes(task));
    const Launch norms{"unit_rows", (p.batch * task.count + kWarps - 1) / kWarps, 1, kThreads};
    if (!launch_unit_rows(task, norms, stream, error) || !launch_nearest(task, stream, error)) return false;
  }
  const Launch starts{"row_starts", p.batch, 1, kThreads, kWarps * sizeof(int)};
  if (!launch(row_starts, task, starts, stream, error)) return false;
  if (p.capacity == 0) return true;
  const Launch rows{"write_rows", p.batch * ((task.count + kWarps - 1) / kWarps), 1, kThreads};
  return launch(write_rows, task, rows, stream, error);
}

}  // namespace cuda
}  // namespace gtp
