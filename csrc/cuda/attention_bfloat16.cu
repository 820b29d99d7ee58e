#include "cuda/attention_run.cuh"

namespace gtp {
namespace cuda {

bool attention_bfloat16(const MapParams& p, void* stream, Error& error) {
  return run_attention<BFloat16>(p, stream, error);
}

}  // namespace cuda
}  // namespace gtp
