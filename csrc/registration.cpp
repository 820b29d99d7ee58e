// The ops of gtp_kernels: schemas from ops/schemas.txt (schemas.inc, made by CMake), and their implementations for CPU
// and GPU tensors, which ops.h describes. With ops.h the only file that includes torch headers.
//
// Compiled with GTP_EMULATE_CUDA, the same ops on the emulated GPU, for CPU tensors, in a namespace of their own.

#ifdef GTP_HAVE_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

#include "ops.h"
#ifdef GTP_HAVE_CUDA
#include "cuda/kernels.h"
#endif
#ifndef GTP_EMULATE_CUDA
#include <dlfcn.h>

#include "cpu/kernels.h"
#endif

namespace gtp {
namespace {

#ifndef GTP_EMULATE_CUDA
const Parallel kParallel = {[](int64_t count, int64_t grain, Parallel::Body body, void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}};

struct Cpu {
  static constexpr const char* kName = "the CPU";
  static bool holds(const Tensor& tensor) {
    return tensor.is_cpu();
  }

  explicit Cpu(const Tensor&) {}

  void attention(const AttentionParams& p, const Tensor&) {
    kernels().attention(p, kParallel);
  }
  void attention_backward(const AttentionBackwardParams& p) {
    kernels().attention_backward(p, kParallel);
  }
  void token_importance(const ImportanceParams& p) {
    gtp::token_importance(p, kParallel);
  }
  void select_tokens(const SelectParams& p) {
    gtp::select_tokens(p, kParallel);
  }
  void propagate(const PropagateParams& p) {
    Error error;
    GTP_CHECK(kernels().propagate(p, kParallel, error), error.text);
  }
  void select_propagate(const SelectPropagateParams& p, const Tensor& like) {
    in_turn(*this, p, like);
  }
  void propagate_backward(const PropagateBackwardParams& p) {
    Error error;
    GTP_CHECK(kernels().propagate_backward(p, kParallel, error), error.text);
  }
  void propagate_dense(const PropagateDenseParams& p) {
    Error error;
    GTP_CHECK(kernels().propagate_dense(p, kParallel, error), error.text);
  }
  void build_graph(const GraphParams& p, const Tensor&) {
    kernels().build_graph(p, kParallel);
  }
  void live_graph(const LiveGraphParams& p, const Tensor&) {
    Error error;
    GTP_CHECK(gtp::live_graph(p, kParallel, error), error.text);
  }
  void live_select(const LiveSelectParams& p, const Tensor&) {
    Error error;
    GTP_CHECK(kernels().live_select(p, kParallel, error), error.text);
  }
};
#endif

#ifdef GTP_HAVE_CUDA
#ifndef GTP_EMULATE_CUDA
// libtorch_cuda is not linked, so that this library loads into a torch without it; a GPU tensor has loaded it.
void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<Get>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  GTP_CHECK(get && get(device, &stream) == 0, "libtorch_cuda does not give its current stream");
  return stream;
}
#endif

// The kernels of cuda/ on the current stream of the device of the first argument.
class Cuda {
 public:
#ifdef GTP_EMULATE_CUDA
  static constexpr const char* kName = "the CPU";
  static bool holds(const Tensor& tensor) {
    return tensor.is_cpu();
  }
  explicit Cuda(const Tensor&) {}
#else
  static constexpr const char* kName = "the GPU";
  static bool holds(const Tensor& tensor) {
    return tensor.is_cuda();
  }
  explicit Cuda(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}
#endif

  void attention(const AttentionParams& p, const Tensor& like) {
    const size_t bytes = cuda::attention_workspace(p);  // none where the map is in registers
    Optional workspace;
    if (bytes > 0) workspace = workspace_of(like, bytes);
    Error error;
    void* const memory = workspace ? workspace->mutable_data_ptr() : nullptr;
    GTP_CHECK(cuda::attention(p, memory, stream_, error), error.text, "; q has shape ",
              text_of({p.batch, p.heads, p.tokens, p.head_size}));
  }
  void token_importance(const ImportanceParams& p) {
    Error error;
    GTP_CHECK(cuda::token_importance(p, stream_, error), error.text, "; the scores have shape ",
              text_of({p.batch, p.heads, p.tokens}));
  }
  void select_tokens(const SelectParams& p) {
    Error error;
    GTP_CHECK(cuda::select_tokens(p, stream_, error), error.text, "; importance has shape ",
              text_of({p.batch, p.count}));
  }
  void propagate(const PropagateParams& p) {
    Error error;
    GTP_CHECK(cuda::propagate(p, stream_, error), error.text, "; x has shape ",
              text_of({p.batch, p.tokens, p.channels}));
  }
  void select_propagate(const SelectPropagateParams& p, const Tensor& like) {
    Error error;
    bool takes = false;
    GTP_CHECK(cuda::takes_select_propagate(p, takes, error), error.text);
    if (!takes) return in_turn(*this, p, like);
    GTP_CHECK(cuda::select_propagate(p, stream_, error), error.text, "; x has shape ",
              text_of({p.step.batch, p.step.tokens, p.step.channels}), ", the scores have ",
              text_of({p.importance.batch, p.importance.heads, p.importance.tokens}));
  }
  void build_graph(const GraphParams& p, const Tensor& like) {
    const Tensor workspace = workspace_of(like, cuda::build_graph_workspace(p));
    Error error;
    GTP_CHECK(cuda::build_graph(p, workspace.mutable_data_ptr(), stream_, error), error.text, "; x has shape ",
              text_of({p.batch, p.tokens, p.channels}));
  }
  void live_graph(const LiveGraphParams& p, const Tensor& like) {
    const Tensor workspace = workspace_of(like, cuda::live_graph_workspace(p));
    Error error;
    GTP_CHECK(cuda::live_graph(p, workspace.mutable_data_ptr(), stream_, error), error.text, "; indices has shape ",
              text_of({p.batch, p.capacity}));
  }
  void live_select(const LiveSelectParams& p, const Tensor& like) {
    const Tensor workspace = workspace_of(like, cuda::live_select_workspace(p));
    Error error;
    GTP_CHECK(cuda::live_select(p, workspace.mutable_data_ptr(), stream_, error), error.text, "; k has shape ",
              text_of({p.batch, p.heads, p.tokens, p.head_size}));
  }

 private:
  static Tensor workspace_of(const Tensor& like, size_t bytes) {
    return empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  }

#ifndef GTP_EMULATE_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};
#endif

}  // namespace
}  // namespace gtp

#ifdef GTP_EMULATE_CUDA
#define GTP_NAMESPACE gtp_kernels_cuda_emulated
#define GTP_CUDA_KEY CPU
#else
#define GTP_NAMESPACE gtp_kernels
#define GTP_CUDA_KEY CUDA
#endif
// The macros of libtorch paste their arguments before these are replaced.
#define GTP_FRAGMENT(name, m) STABLE_TORCH_LIBRARY_FRAGMENT(name, m)
#define GTP_IMPLEMENTATION(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

GTP_FRAGMENT(GTP_NAMESPACE, m) {
#define GTP_SCHEMA(text) m.def(text);
#include "schemas.inc"
#undef GTP_SCHEMA
}

#ifndef GTP_EMULATE_CUDA
STABLE_TORCH_LIBRARY_IMPL(gtp_kernels, CPU, m) {
  using On = gtp::Ops<gtp::Cpu>;
  m.impl("attention_with_scores", TORCH_BOX(&On::attention_with_scores));
  m.impl("attention_with_scores_backward", TORCH_BOX(&On::attention_with_scores_backward));
  m.impl("token_importance", TORCH_BOX(&On::importance_op));
  m.impl("select_tokens", TORCH_BOX(&On::select_op));
  m.impl("propagate", TORCH_BOX(&On::propagate_op));
  m.impl("propagate_backward", TORCH_BOX(&On::propagate_backward_op));
  m.impl("propagate_dense", TORCH_BOX(&On::propagate_dense_op));
  m.impl("residual_propagate_norm", TORCH_BOX(&On::residual_propagate_norm));
  m.impl("select_residual_propagate_norm", TORCH_BOX(&On::select_residual_propagate_norm));
  m.impl("build_graph", TORCH_BOX(&On::build_graph_op));
  m.impl("live_graph", TORCH_BOX(&On::live_graph_op));
  m.impl("live_select", TORCH_BOX(&On::live_select_op));
  m.impl("live_merge", TORCH_BOX(&On::live_merge));
}
#endif

#ifdef GTP_HAVE_CUDA
GTP_IMPLEMENTATION(GTP_NAMESPACE, GTP_CUDA_KEY, m) {
  using On = gtp::Ops<gtp::Cuda>;
  m.impl("attention_with_scores", TORCH_BOX(&On::attention_with_scores));
  m.impl("token_importance", TORCH_BOX(&On::importance_op));
  m.impl("select_tokens", TORCH_BOX(&On::select_op));
  m.impl("propagate", TORCH_BOX(&On::propagate_op));
  m.impl("residual_propagate_norm", TORCH_BOX(&On::residual_propagate_norm));
  m.impl("select_residual_propagate_norm", TORCH_BOX(&On::select_residual_propagate_norm));
  m.impl("build_graph", TORCH_BOX(&On::build_graph_op));
  m.impl("live_graph", TORCH_BOX(&On::live_graph_op));
  m.impl("live_select", TORCH_BOX(&On::live_select_op));
  m.impl("live_merge", TORCH_BOX(&On::live_merge));
}
#endif
