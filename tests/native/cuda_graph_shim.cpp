// csrc/cuda/graph.cu on the emulated GPU, for ctypes: integers and pointers in, the text of the error out.
#include "cuda/graph.cu"

extern "C" int64_t graph_workspace(const int64_t* sizes) {
  gtp::GraphParams p;
  p.batch = sizes[0], p.tokens = sizes[1], p.channels = sizes[2], p.prefix = sizes[3], p.height = sizes[4];
  p.width = sizes[5], p.type = static_cast<gtp::GraphType>(sizes[6]), p.neighbours = sizes[7], p.capacity = sizes[8];
  return static_cast<int64_t>(gtp::cuda::build_graph_workspace(p));
}

// strides of x: batch, token; outputs as in GraphParams; error has room for 256 characters.
extern "C" int build_graph(const void* x, int dtype, const int64_t* strides, const int64_t* sizes, int32_t* indptr,
                           int32_t* indices, float* values, void* workspace, char* error) {
  gtp::GraphParams p;
  p.x = {x, static_cast<gtp::DType>(dtype), strides[0], strides[1]};
  p.batch = sizes[0], p.tokens = sizes[1], p.channels = sizes[2], p.prefix = sizes[3], p.height = sizes[4];
  p.width = sizes[5], p.type = static_cast<gtp::GraphType>(sizes[6]), p.neighbours = sizes[7], p.capacity = sizes[8];
  p.indptr = indptr, p.indices = indices, p.values = values;
  gtp::Error e;
  const bool good = gtp::cuda::build_graph(p, workspace, nullptr, e);
  std::memcpy(error, e.text, sizeof e.text);
  return good;
}
