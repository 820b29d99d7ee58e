// build_graph: the 8 grid neighbours, the M most similar tokens, or both, as one CSR per image.
//
//   unit_rows     u_i = x_i / max(|x_i|, 1e-12) in float32, padded with zeros to whole chunks of channels
//   nearest_rows  the M largest u_i u_j of every row, the products never leaving registers, and how many of the M are
//                 not neighbours on the grid anyway
//   row_starts    the degrees and their running sum, one block per image
//   write_rows    every row sorted, with 1 / sqrt(deg_i deg_j)
//
// n^2 C multiply-adds per image. The u take 4 C bytes per token, no more than the hidden layer of an MLP in half
// precision, before there is any. A block of nearest_rows copies 768 bytes per channel for 8,192 multiply-adds.
#pragma once

#include <math.h>

#include "cuda/launch.cuh"

namespace gtp {
namespace cuda {
namespace graph {

struct Task {
  GraphParams params;
  int32_t count = 0;           // n = height * width
  int32_t padded = 0;          // channels, up to whole chunks
  int32_t listed = 0;          // M, or 0 where no similarity is asked for
  int32_t tiles = 0;           // blocks of an image in nearest_rows
  float* unit = nullptr;       // [B, n, padded]
  int32_t* nearest = nullptr;  // [B, n, M], by falling similarity
};

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
// Columns and channels of a tile; each warp owns kOwnRows rows of it, and lane l the columns l + 32 q.
constexpr int kTileColumns = 128;
constexpr int kChunk = 16;
constexpr int kOwnRows = 8;
constexpr int kOwnColumns = kTileColumns / kLanes;
// An odd number of 16-byte pieces: the eight lanes that are served at once meet different banks.
constexpr int kTileStride = kChunk + 4;
constexpr int kPieces = kChunk / 4;

// Bytes that a block of nearest_rows shares: two stages of tiles, the best so far and the bound of each row.
GTP_FORCE_INLINE int64_t nearest_shared(int64_t warps, int64_t slots) {
  const int64_t rows = warps * kOwnRows;
  return 2 * (rows + kTileColumns) * kTileStride * 4 + rows * (slots * kLanes + 1) * 8;
}

struct alignas(16) FourFloats {
  float v[4];
};

GTP_DEVICE float element(const float* x) {
  return *x;
}
GTP_DEVICE float element(const BFloat16* x) {
  return widen(x->bits, BFloat16{});
}
GTP_DEVICE float element(const Float16* x) {
  return widen(x->bits, Float16{});
}

// One warp per row. A norm that overflows makes zeros of finite values and NaN of others, as in the definition.
template <class T>
GTP_GLOBAL(kThreads, 4)
unit_rows(GTP_CONSTANT Task task) {
  const GraphParams& p = task.params;
  const int64_t row = int64_t{blockIdx.x} * kWarps + warp_id();
  if (row >= p.batch * task.count) return;
  const T* const x =
      static_cast<const T*>(p.x.data) + row / task.count * p.x.stride_b + (p.prefix + row % task.count) * p.x.stride_n;
  float squares = 0;
  for (int64_t c = lane_id(); c < p.channels; c += kLanes) {
    const float value = element(x + c);
    squares = fmaf(value, value, squares);
  }
  const float norm = sqrtf(sum_lanes(squares));
  const float divisor = norm < 1e-12f ? 1e-12f : norm;
  float* const unit = task.unit + row * task.padded;
  for (int64_t c = lane_id(); c < task.padded; c += kLanes) unit[c] = c < p.channels ? element(x + c) / divisor : 0.0f;
}

// Orders candidates: the larger similarity, then the lower column; NaN below everything, and `kNothing` below that.
constexpr uint64_t kNothing = 0;
constexpr uint64_t kEverything = ~uint64_t{0};
GTP_DEVICE uint64_t candidate_key(float similarity, int column) {
  const uint32_t bits = bits_of(similarity + 0.0f);  // -0 becomes 0
  const uint32_t order = similarity != similarity ? 0u : bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(order) << 32 | ~static_cast<uint32_t>(column);
}
GTP_DEVICE int column_of(uint64_t key) {
  return static_cast<int>(~static_cast<uint32_t>(key));
}

// best: descending, place 32 s + l in best[s] of lane l. The last one falls out.
template <int kSlots>
GTP_DEVICE void insert(uint64_t (&best)[kSlots], uint64_t key) {
  GTP_UNROLL
  for (int s = kSlots - 1; s >= 0; --s) {
    uint64_t before = shuffle_up(best[s], 1);
    const uint64_t carried = s > 0 ? shuffle(best[s > 0 ? s - 1 : 0], kLanes - 1) : kEverything;
    if (lane_id() == 0) before = carried;
    if (best[s] < key) best[s] = before < key ? before : key;
  }
}

// The element at `place`, in every lane.
template <int kSlots>
GTP_DEVICE uint64_t place_of(const uint64_t (&best)[kSlots], int place) {
  uint64_t own = best[0];
  GTP_UNROLL
  for (int s = 1; s < kSlots; ++s) own = place >= s * kLanes ? best[s] : own;
  return shuffle(own, place % kLanes);
}

// Whether two tokens of a grid touch, diagonals included.
GTP_DEVICE bool adjacent(int i, int j, int width) {
  const int y = i / width - j / width, x = i % width - j % width;
  return y >= -1 && y <= 1 && x >= -1 && x <= 1;
}

// A block owns blockDim.x / 4 rows of one image and sweeps its columns, once for every kSlots * 32 neighbours: a sweep
// after the first looks only at what comes behind the last one found. indptr[i + 1] = the neighbours of row i that are
// not on the grid too. Every product is summed over the channels in order by one lane: equal rows of x give equal
// similarities, wherever they stand.
template <int kSlots>
GTP_GLOBAL(kThreads, 2)
nearest_rows(GTP_CONSTANT Task task) {
  constexpr int kFound = kSlots * kLanes;
  GTP_SHARED(shared);
  const int warps = static_cast<int>(blockDim.x) / kLanes, rows = warps * kOwnRows;
  float* const tiles = reinterpret_cast<float*>(shared);
  const int stage_floats = (rows + kTileColumns) * kTileStride;
  // A lane reads and writes its own places only.
  uint64_t* const lists = reinterpret_cast<uint64_t*>(tiles + 2 * stage_floats) + warp_id() * kOwnRows * kFound;
  uint64_t* const bounds = reinterpret_cast<uint64_t*>(tiles + 2 * stage_floats) + rows * kFound + warp_id() * kOwnRows;

  const GraphParams& p = task.params;
  const int n = task.count, lane = lane_id();
  const int64_t image = blockIdx.x / static_cast<unsigned>(task.tiles);
  const int block_row = static_cast<int>(blockIdx.x % static_cast<unsigned>(task.tiles)) * rows;
  const int own_row = block_row + warp_id() * kOwnRows;
  const float* const unit = task.unit + image * n * task.padded;
  int32_t* const degree = p.indptr + image * (n + 1) + 1;
  const int chunks = task.padded / kChunk;

  // blockDim.x / kPieces rows at once: first those of the block, then the columns.
  const auto fetch = [&](int tile, int chunk, int stage) {
    const int piece = static_cast<int>(threadIdx.x) % kPieces * 4;
    GTP_NO_UNROLL
    for (int r = static_cast<int>(threadIdx.x) / kPieces; r < rows + kTileColumns; r += rows) {
      const int token = r < rows ? block_row + r : tile * kTileColumns + r - rows;
      const bool valid = token < n;
      copy_async(tiles + stage * stage_floats + r * kTileStride + piece,
                 unit + (valid ? token : 0) * int64_t{task.padded} + chunk * kChunk + piece, valid);
    }
    commit_copies();
  };

  GTP_NO_UNROLL
  for (int done = 0; done < task.listed; done += kFound) {
    const int wanted = task.listed - done < kFound ? task.listed - done : kFound;
    GTP_NO_UNROLL
    for (int r = 0; r < kOwnRows; ++r) {
      GTP_UNROLL
      for (int s = 0; s < kSlots; ++s) lists[r * kFound + s * kLanes + lane] = kNothing;
      if (done == 0 && lane == 0) bounds[r] = kEverything;
    }
    sync_warp();

    fetch(0, 0, 0);
    int stage = 0;
    GTP_NO_UNROLL
    for (int tile = 0; tile * kTileColumns < n; ++tile) {
      float sums[kOwnRows][kOwnColumns] = {};
      GTP_NO_UNROLL
      for (int chunk = 0; chunk < chunks; ++chunk, stage ^= 1) {
        wait_copies<0>();
        sync_block();  // this stage has come, and the other one has been read
        const bool same_tile = chunk + 1 < chunks;
        if (same_tile || (tile + 1) * kTileColumns < n) {
          fetch(same_tile ? tile : tile + 1, same_tile ? chunk + 1 : 0, stage ^ 1);
        }
        const float* const left = tiles + stage * stage_floats + warp_id() * kOwnRows * kTileStride;
        const float* const right = tiles + stage * stage_floats + (rows + lane) * kTileStride;
        // In halves: unrolled as a whole, it spills on sm_120.
        GTP_NO_UNROLL
        for (int half = 0; half < kChunk; half += kChunk / 2) {
          GTP_UNROLL
          for (int c = half; c < half + kChunk / 2; c += 4) {
            FourFloats b[kOwnColumns];
            GTP_UNROLL
            for (int q = 0; q < kOwnColumns; ++q) {
              b[q] = *reinterpret_cast<const FourFloats*>(right + q * kLanes * kTileStride + c);
            }
            GTP_UNROLL
            for (int r = 0; r < kOwnRows; ++r) {
              const FourFloats a = *reinterpret_cast<const FourFloats*>(left + r * kTileStride + c);
              GTP_UNROLL
              for (int k = 0; k < 4; ++k) {
                GTP_UNROLL
                for (int q = 0; q < kOwnColumns; ++q) sums[r][q] = fmaf(a.v[k], b[q].v[k], sums[r][q]);
              }
            }
          }
        }
      }

      GTP_UNROLL
      for (int r = 0; r < kOwnRows; ++r) {
        if (own_row + r < n) {
          uint64_t* const list = lists + r * kFound + lane;
          uint64_t best[kSlots];
          GTP_UNROLL
          for (int s = 0; s < kSlots; ++s) best[s] = list[s * kLanes];
          uint64_t worst = place_of(best, wanted - 1);
          const uint64_t bound = bounds[r];
          GTP_UNROLL
          for (int q = 0; q < kOwnColumns; ++q) {
            const int column = tile * kTileColumns + q * kLanes + lane;
            uint64_t key = candidate_key(sums[r][q], column);
            if (column >= n || column == own_row + r || key >= bound) key = kNothing;
            GTP_NO_UNROLL
            for (unsigned better = ballot(key > worst); better != 0; better &= better - 1) {
              const uint64_t next = shuffle(key, lowest_bit(better));
              if (next > worst) {
                insert(best, next);
                worst = place_of(best, wanted - 1);
              }
            }
          }
          GTP_UNROLL
          for (int s = 0; s < kSlots; ++s) list[s * kLanes] = best[s];
        }
      }
    }

    sync_warp();
    GTP_NO_UNROLL
    for (int r = 0; r < kOwnRows && own_row + r < n; ++r) {
      const int row = own_row + r;
      int32_t* const target = task.nearest + (image * n + row) * task.listed + done;
      uint64_t best[kSlots];
      int apart = 0;
      GTP_UNROLL
      for (int s = 0; s < kSlots; ++s) {
        best[s] = lists[r * kFound + s * kLanes + lane];
        const int place = s * kLanes + lane, column = column_of(best[s]);
        const bool found = place < wanted;
        if (found) target[place] = column;
        const bool counts =
            found && (p.type == GraphType::Semantic || !adjacent(row, column, static_cast<int>(p.width)));
        apart += count_bits(ballot(counts));
      }
      const uint64_t last = place_of(best, wanted - 1);
      if (lane == 0) {
        bounds[r] = last;
        degree[row] = (done == 0 ? 0 : degree[row]) + apart;
      }
    }
    sync_block();  // before the next sweep fetches over a stage that is still read
  }
}

// One block per image: indptr, in place over the counts of nearest_rows.
GTP_GLOBAL(kThreads, 4)
row_starts(GTP_CONSTANT Task task) {
  GTP_SHARED(shared);
  int* const of_warps = reinterpret_cast<int*>(shared);
  const GraphParams& p = task.params;
  const int n = task.count, height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  int32_t* const indptr = p.indptr + int64_t{blockIdx.x} * (n + 1);
  if (threadIdx.x == 0) indptr[0] = 0;
  int edges = 0;
  for (int i0 = 0; i0 < n; i0 += kThreads) {
    const int i = i0 + static_cast<int>(threadIdx.x);
    int degree = 0;
    if (i < n) {
      if (task.listed > 0) degree = indptr[i + 1];
      if (p.type != GraphType::Semantic) {
        const int y = i / width, x = i % width;
        degree += (1 + (y > 0) + (y + 1 < height)) * (1 + (x > 0) + (x + 1 < width)) - 1;
      }
    }
    const int sum = scan_lanes(degree);
    if (lane_id() == kLanes - 1) of_warps[warp_id()] = sum;
    sync_block();
    int before = 0, all = 0;
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp_id() ? of_warps[w] : 0;
      all += of_warps[w];
    }
    if (i < n) indptr[i + 1] = edges + before + sum;
    edges += all;
    sync_block();
  }
}

// The columns of row i in no order, each once: its M semantic neighbours, less those on the grid where that comes too,
// then the places of a 3 x 3 window without its centre. kNoColumn where there is none, and beyond the last.
constexpr int kNoColumn = 0x7fffffff;
GTP_DEVICE int column_at(const Task& task, const int32_t* nearest, int i, int t) {
  const GraphParams& p = task.params;
  const bool on_grid = p.type != GraphType::Semantic;
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  if (t < task.listed) {
    const int column = nearest[t];
    return on_grid && adjacent(i, column, width) ? kNoColumn : column;
  }
  int side = t - task.listed;
  if (!on_grid || side >= 8) return kNoColumn;
  side += side >= 4;
  const int y = i / width + side / 3 - 1, x = i % width + side % 3 - 1;
  return y >= 0 && y < height && x >= 0 && x < width ? y * width + x : kNoColumn;
}

// One warp per row; the place of a column within it by counting, (M + 8)^2 comparisons. Zeros beyond the last row.
GTP_GLOBAL(kThreads, 4)
write_rows(GTP_CONSTANT Task task) {
  const GraphParams& p = task.params;
  const int n = task.count;
  const unsigned blocks = static_cast<unsigned>((n + kWarps - 1) / kWarps);
  const int64_t image = blockIdx.x / blocks;
  const int part = static_cast<int>(blockIdx.x % blocks), i = part * kWarps + warp_id();
  const int32_t* const indptr = p.indptr + image * (n + 1);
  int32_t* const indices = p.indices + image * p.capacity;
  float* const values = p.values + image * p.capacity;
  for (int64_t e = int64_t{indptr[n]} + part * kThreads + threadIdx.x; e < p.capacity;
       e += int64_t{blocks} * kThreads) {
    indices[e] = 0;
    values[e] = 0.0f;
  }
  if (i >= n) return;
  const int32_t* const nearest = task.nearest + (image * n + i) * task.listed;
  const int candidates = task.listed + (p.type == GraphType::Semantic ? 0 : 8);
  const int begin = indptr[i], degree = indptr[i + 1] - begin;
  for (int t = 0; t < candidates; t += kLanes) {
    const int column = column_at(task, nearest, i, t + lane_id());
    int place = begin;
    for (int u = 0; u < candidates; u += kLanes) {
      const int other = u == t ? column : column_at(task, nearest, i, u + lane_id());
      const int lanes = candidates - u < kLanes ? candidates - u : kLanes;
      for (int l = 0; l < lanes; ++l) place += shuffle(other, l) < column;
    }
    if (column != kNoColumn) {
      const int degree_other = indptr[column + 1] - indptr[column];
      const double product = static_cast<double>(degree) * degree_other;
      indices[place] = column;
      values[place] = product > 0 ? static_cast<float>(1.0 / sqrt(product)) : 0.0f;
    }
  }
}

}  // namespace graph
}  // namespace cuda
}  // namespace gtp
