// csrc/cpu/threshold.h for ctypes: the exact threshold of a map, and how often the map was swept for it.
#include "cpu/threshold.h"

#include <cmath>
#include <vector>

using namespace gtp::GTP_ISA;

extern "C" int64_t step_of_sample(int64_t tokens) {
  return sample_step(tokens);
}
extern "C" int64_t sampled_of_row() {
  return Vec<float>::W;
}

// map: [tokens, tokens], contiguous. A search of the whole map sweeps it several times, the usual way once.
extern "C" float threshold(const float* map, int64_t tokens, int64_t rank, int64_t* sweeps) {
  constexpr int W = Vec<float>::W;
  const int64_t width = (tokens + W - 1) / W * W;
  std::vector<float> rows(static_cast<size_t>(tokens * width), NAN);
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t j = 0; j < tokens; ++j) rows[i * width + j] = map[i * tokens + j];
  }
  std::vector<float> first(threshold_room<float>(tokens)), second(first.size());
  for (int64_t i = 0; i < tokens && is_sampled<float>(tokens); ++i) {
    sample_row(rows.data() + i * width, 1.0f, i, sample_step(tokens), tokens, first.data());
  }
  const auto sweep = [&](const auto& body) {
    ++*sweeps;
    for (int64_t i = 0; i < tokens && body(rows.data() + i * width, 1.0f); ++i) {
    }
  };
  return map_threshold(sweep, tokens, rank, false, first.data(), second.data());
}
