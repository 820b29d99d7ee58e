// build_graph: the 8 grid neighbours, the M most similar tokens, or both, as one CSR per image.
//
// Semantic: 2 n^2 C FLOPs per image. The rows are normalised and packed once (shared by all threads), then each task
// multiplies kRows rows with all of them and keeps the M best of every row: the n x n similarities never exist.
// Images go in groups, so that the packed rows stay below kGroupBytes.

#include <cstdlib>
#include <cstring>
#include <new>

#include "dtype.h"
#include "gemm.h"
#include "kernels.h"
#include "scratch.h"
#include "vec.h"

namespace gtp {
namespace GTP_ISA {
namespace {

constexpr int64_t kGroupBytes = int64_t{32} << 20;

// malloc with a destructor; throws std::bad_alloc.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count) : data(static_cast<T*>(std::malloc(static_cast<size_t>(count) * sizeof(T) + 64))) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() {
    std::free(data);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// x / max(|x|, 1e-12)
template <class A>
void normalise(const A* row, int64_t count, A* target) {
  constexpr int W = Vec<A>::W;
  typename Vec<A>::V s{};
  int64_t c = 0;
  for (; c + W <= count; c += W) s += load(row + c) * load(row + c);
  A squares = reduce_sum<A>(s);
  for (; c < count; ++c) squares += row[c] * row[c];
  const A norm = root(squares);
  const A divisor = norm < A(1e-12) ? A(1e-12) : norm;
  for (c = 0; c < count; ++c) target[c] = row[c] / divisor;
}

// The `most` largest of row[0..count) without `self`, ties to the lower index, NaN below everything; then by index.
// best_value and best_index have room for `most`.
template <class A>
void largest(const A* row, int64_t count, int64_t self, int64_t most, A* best_value, int32_t* best_index) {
  int64_t held = 0;
  for (int64_t j = 0; j < count; ++j) {
    if (j == self) continue;
    const A value = row[j] == row[j] ? row[j] : -Vec<A>::inf;
    if (held == most && !(value > best_value[most - 1])) continue;
    int64_t at = held < most ? held++ : most - 1;
    for (; at > 0 && value > best_value[at - 1]; --at) {
      best_value[at] = best_value[at - 1];
      best_index[at] = best_index[at - 1];
    }
    best_value[at] = value;
    best_index[at] = static_cast<int32_t>(j);
  }
  for (int64_t i = 1; i < held; ++i) {
    const int32_t index = best_index[i];
    int64_t at = i;
    for (; at > 0 && best_index[at - 1] > index; --at) best_index[at] = best_index[at - 1];
    best_index[at] = index;
  }
}

// neighbours [images, count, most] of images b0 to b0 + images, each row ascending.
template <class A>
void semantic(const GraphParams& p, const Parallel& parallel, int64_t b0, int64_t images, int64_t count, A* rows,
              A* packed, int32_t* neighbours) {
  constexpr int W = Vec<A>::W;
  const Panels panels((count + W - 1) / W);
  const int64_t width = panels.vectors * W, channels = p.channels, most = p.neighbours;
  auto normalise_rows = [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::bytes<A>(channels));
    A* buffer = scratch.take<A>(channels);
    for (int64_t t = begin; t < end; ++t) {
      const A* row = load_row(p.x, b0 + t / count, p.prefix + t % count, channels, buffer);
      normalise(row, channels, rows + t * channels);
    }
  };
  parallel_for(parallel, images * count, 32, normalise_rows);
  auto pack = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t image = t / panels.count, panel = t % panels.count, first = panels.start(panel) * W;
      pack_transposed(
          channels, first, count, panels.width(panel) * W,
          [&](int64_t j, int) { return rows + (image * count + j) * channels; },
          packed + image * channels * width + first * channels);
    }
  };
  parallel_for(parallel, images * panels.count, 1, pack);
  const int64_t tiles = (count + kRows - 1) / kRows;
  auto compare = [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::bytes<A>(kRows * width) + Scratch::bytes<A>(most));
    A* similarity = scratch.take<A>(kRows * width);
    A* best_value = scratch.take<A>(most);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t image = t / tiles, i0 = t % tiles * kRows;
      const int64_t height = count - i0 < kRows ? count - i0 : kRows;
      multiply(height, channels, rows + (image * count + i0) * channels, channels, packed + image * channels * width,
               panels, similarity, width);
      for (int64_t i = 0; i < height; ++i) {
        largest(similarity + i * width, count, i0 + i, most, best_value, neighbours + (image * count + i0 + i) * most);
      }
    }
  };
  parallel_for(parallel, images * tiles, 1, compare);
}

// The grid neighbours of token i in ascending order; returns how many.
int64_t spatial(int64_t i, int64_t height, int64_t width, int32_t target[8]) {
  const int64_t y = i / width, x = i % width;
  int64_t found = 0;
  for (int64_t v = y - 1; v <= y + 1; ++v) {
    for (int64_t u = x - 1; u <= x + 1; ++u) {
      if (v < 0 || v >= height || u < 0 || u >= width || (v == y && u == x)) continue;
      target[found++] = static_cast<int32_t>(v * width + u);
    }
  }
  return found;
}

// The CSR of one image from its sorted semantic neighbours (nullptr where there are none).
void assemble(const GraphParams& p, int64_t b, int64_t count, const int32_t* neighbours) {
  int32_t* indptr = p.indptr + b * (count + 1);
  int32_t* indices = p.indices + b * p.capacity;
  float* values = p.values + b * p.capacity;
  int64_t edges = 0;
  indptr[0] = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t grid[8];
    const int64_t near = p.type == GraphType::Semantic ? 0 : spatial(i, p.height, p.width, grid);
    const int64_t alike = neighbours ? p.neighbours : 0;
    const int32_t* other = neighbours + (neighbours ? i * p.neighbours : 0);
    for (int64_t g = 0, s = 0; g < near || s < alike;) {
      const bool from_grid = g < near && (s == alike || grid[g] <= other[s]);
      const int32_t column = from_grid ? grid[g] : other[s];
      if (g < near && grid[g] == column) ++g;
      if (s < alike && other[s] == column) ++s;
      indices[edges++] = column;
    }
    indptr[i + 1] = static_cast<int32_t>(edges);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int32_t degree = indptr[i + 1] - indptr[i];
    for (int32_t e = indptr[i]; e < indptr[i + 1]; ++e) {
      const int32_t other = indptr[indices[e] + 1] - indptr[indices[e]];
      values[e] = other > 0 ? static_cast<float>(1.0 / root(static_cast<double>(degree) * other)) : 0.0f;
    }
  }
  for (int64_t e = edges; e < p.capacity; ++e) {
    indices[e] = 0;
    values[e] = 0.0f;
  }
}

template <class A>
void run_graph(const GraphParams& p, const Parallel& parallel) {
  const int64_t count = p.height * p.width;
  const bool compares = p.type != GraphType::Spatial && p.neighbours > 0 && count > 0;
  const int64_t width = (count + Vec<A>::W - 1) / Vec<A>::W * Vec<A>::W;
  const int64_t image_size = compares ? (count + width) * p.channels : 0;
  int64_t group = p.batch;
  if (image_size > 0) {
    const int64_t fit = kGroupBytes / (image_size * static_cast<int64_t>(sizeof(A)));
    group = fit < 1 ? 1 : fit < p.batch ? fit : p.batch;
  }
  const Buffer<A> rows(compares ? group * count * p.channels : 0), packed(compares ? group * width * p.channels : 0);
  const Buffer<int32_t> neighbours(compares ? group * count * p.neighbours : 0);
  for (int64_t b0 = 0; b0 < p.batch; b0 += group) {
    const int64_t images = p.batch - b0 < group ? p.batch - b0 : group;
    if (compares) semantic(p, parallel, b0, images, count, rows.data, packed.data, neighbours.data);
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        assemble(p, b0 + b, count, compares ? neighbours.data + b * count * p.neighbours : nullptr);
      }
    };
    parallel_for(parallel, images, 1, body);
  }
}

}  // namespace

void build_graph(const GraphParams& p, const Parallel& parallel) {
  if (p.x.dtype == DType::Float64) {
    run_graph<double>(p, parallel);
  } else {
    run_graph<float>(p, parallel);
  }
}

}  // namespace GTP_ISA
}  // namespace gtp
