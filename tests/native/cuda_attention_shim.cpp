// csrc/cuda/attention.cu on the emulated GPU, for ctypes: each form on its own, in bfloat16, and what the op does not
// show of it.
#include "cuda/attention.cu"

namespace gtp {
namespace cuda {

bool attention_bfloat16(const MapParams&, void*, Error&) {
  return false;
}
bool attention_float16(const MapParams&, void*, Error&) {
  return false;
}

}  // namespace cuda
}  // namespace gtp

// form 0: registers; 1: sweeps, for d up to 64. sizes: B, H, N, d, rank, force_miss. q, k, v, out:
// contiguous [B, H, N, d], out [B, N, H, d]. workspace: at least workspace_bytes(sizes).
extern "C" int64_t workspace_bytes(const int64_t* sizes) {
  gtp::AttentionParams a;
  a.batch = sizes[0], a.heads = sizes[1], a.tokens = sizes[2], a.head_size = sizes[3], a.rank = sizes[4];
  gtp::cuda::Workspace w;
  size_t counters;
  return static_cast<int64_t>(place_workspace(gtp::cuda::map_params(a, nullptr), nullptr, w, counters));
}

extern "C" uint64_t atomic_adds() {
  return gtp::cuda::atomic_adds;
}

extern "C" unsigned image_of(unsigned heads, unsigned head) {
  gtp::cuda::MapParams p;
  set_image_heads(p, heads);
  return p.image_of(head);
}

extern "C" int attention(int form, const int64_t* sizes, const void* q, const void* k, const void* v,
                         const float* scales, double scale, void* out, float* diag, float* colsum, float* cls_row,
                         void* workspace, char* error) {
  using namespace gtp;
  AttentionParams a;
  a.batch = sizes[0], a.heads = sizes[1], a.tokens = sizes[2], a.head_size = sizes[3], a.rank = sizes[4];
  a.force_miss = sizes[5];
  for (auto stride : {a.stride_q, a.stride_k, a.stride_v}) {
    stride[3] = 1, stride[2] = a.head_size, stride[1] = a.tokens * stride[2], stride[0] = a.heads * stride[1];
  }
  a.q = q, a.k = k, a.v = v, a.dtype = DType::BFloat16, a.scale = scale;
  a.token_scales = {scales, DType::Float32};
  a.out = out, a.diag = diag, a.colsum = colsum, a.cls_row = cls_row;
  const cuda::MapParams p = cuda::map_params(a, workspace);
  Error e;
  const cuda::Machine m;
  const bool good = form == 1          ? cuda::by_sweeps<cuda::BFloat16, 64>(p, nullptr, e)
                    : a.head_size > 96 ? cuda::in_registers<cuda::BFloat16, 128, 24, 25>(p, m, nullptr, e)
                    : a.head_size > 64 ? cuda::in_registers<cuda::BFloat16, 96, 24, 26>(p, m, nullptr, e)
                                       : cuda::in_registers<cuda::BFloat16, 64, 0, 8, 14, 24, 25, 26>(p, m, nullptr, e);
  std::memcpy(error, e.text, sizeof e.text);
  return good;
}
