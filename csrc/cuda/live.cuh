// live_select: which rows leave by live edges, and into which each goes. live_graph: both directions of every edge.
//
//   unit_i  = the mean of k_i over heads at unit length;  w_ij = unit_i unit_j, -1 for what is no number
//   best_i  = max w_ij over the neighbours j of i
//   score_i = (1 - best_i) max(importance_i / mean, 1e-6)^gamma, +inf for a row without edges
//
// and then the walk over the rows in rising order of score: reference/live.py is its definition. Every slot of the CSR
// keeps its w and the row at its other end as one integer, so that the walk compares integers alone. A w is the same to
// the bit whichever end asks for it: its products are summed in an order that does not know the ends.
//
// Small images take one launch, a block for each, with everything in shared memory (the edges only where they fit).
// Where the unit keys do not fit, four: keys, edges and order by many blocks, then the walk. Moved: H d elements of k
// per row once; per slot, from shared memory or cache, 4 d bytes and 16 more, and 2 d FLOPs; n^2 comparisons of 4 bytes
// for the order. The walk waits for a slot's 8 bytes once or twice for each row that leaves.
#pragma once

#include <math.h>

#include "cuda/kernels.h"
#include "cuda/select.cuh"
#include "cuda/warp.cuh"

namespace gtp {
namespace cuda {
namespace live {

constexpr int kImageThreads = 768;  // of a block that has an image to itself
constexpr int kThreads = 256;       // of others
constexpr int kWarps = kThreads / kLanes;
constexpr int kHeads = 8;  // whose keys are on their way at once
constexpr int kGroup = 8;  // lanes that share an edge
constexpr int kEdges = 4;  // edges that they have at once
constexpr float kLeastImportance = 1e-6f;

// In `into`, beside the row that one went to. The first two are there still.
constexpr int kTarget = -3, kStays = -2, kDropped = -1;

// An array of an image, in shared memory or in the workspace.
struct Part {
  bool shared = false;
  int64_t offset = 0;
};

struct Task {
  LiveSelectParams params;
  int rows = 0, kept = 0;  // n and n - P
  int padded = 0;          // d, up to a multiple of 4
  bool pairs = false;      // two channels of k are one aligned word
  bool one_launch = false;
  int blocks = 0;                          // of an image, of those that are launched for each
  Part unit;                               // float [n, padded]
  Part candidate;                          // uint64 [E], 0 where there is no edge
  Part key;                                // uint32 [n], padded to a multiple of 32: of best, then of the score
  Part first, next;                        // int [n], [n0]: lists of the original tokens that a row carries
  Part order;                              // int [n], by falling score; after the walk the places
  Part into, total;                        // int [n], double [n]
  uint32_t scratch = 0, shared_bytes = 0;  // 64 integers and the mean
  int64_t image_bytes = 0;                 // of the workspace
  unsigned char* workspace = nullptr;
};

struct alignas(16) FourFloats {
  float v[4];
};
struct alignas(8) TwoFloats {
  float v[2];
};

GTP_DEVICE float number(float x) {
  return x;
}
GTP_DEVICE float number(BFloat16 x) {
  return widen(x.bits, x);
}
GTP_DEVICE float number(Float16 x) {
  return widen(x.bits, x);
}

// Two channels that follow each other, the first `count` of them; zeros otherwise.
template <class T>
GTP_DEVICE TwoFloats load_pair(const T* x, int64_t stride, bool pairs, int count) {
  if (count == 2 && pairs) {
    if constexpr (sizeof(T) == 4) {
      return *reinterpret_cast<const TwoFloats*>(x);
    } else {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(x);
      return {{widen(static_cast<uint16_t>(word), T{}), widen(static_cast<uint16_t>(word >> 16), T{})}};
    }
  }
  return {{count > 0 ? number(x[0]) : 0.f, count > 1 ? number(x[stride]) : 0.f}};
}

// A key of select.cuh as the value that it is of; not 0.
GTP_DEVICE float value_of(uint32_t key) {
  return float_of(key >> 31 ? key & 0x7fffffffu : ~key);
}
// The larger w first, then the lower row.
GTP_DEVICE uint64_t candidate_of(float w, int row) {
  return static_cast<uint64_t>(ordered_key(w)) << 32 | ~static_cast<uint32_t>(row);
}
GTP_DEVICE int row_of(uint64_t candidate) {
  return static_cast<int>(~static_cast<uint32_t>(candidate));
}

template <class V>
GTP_DEVICE V largest_of_lanes(V value) {
  GTP_UNROLL
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    const V other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

struct Range {
  int begin, end;
};

// The edges of row i of a CSR; begin and end lie in it whatever it holds.
GTP_DEVICE Range edges_of_row(const int32_t* indptr, int i, int64_t all) {
  const int capacity = static_cast<int>(all), begin = indptr[i], end = indptr[i + 1];
  const int first = begin < 0 ? 0 : begin < capacity ? begin : capacity;
  return {first, end < first ? first : end < capacity ? end : capacity};
}

struct Image {
  const Task& task;
  const LiveSelectParams& p;
  unsigned char* const shared;
  const int64_t b;
  const int rows, origins;
  const int32_t *const indptr, *const indices, *const rep;

  GTP_DEVICE Image(const Task& of, unsigned char* memory, int64_t image)
      : task(of),
        p(of.params),
        shared(memory),
        b(image),
        rows(of.rows),
        origins(static_cast<int>(p.origins)),
        indptr(p.indptr + image * (p.origins + 1)),
        indices(p.indices + image * p.capacity),
        rep(p.rep + image * p.origins) {}

  template <class V>
  GTP_DEVICE V* at(const Part& part) const {
    unsigned char* const memory = part.shared ? shared : task.workspace + b * task.image_bytes;
    return reinterpret_cast<V*>(memory + part.offset);
  }
  GTP_DEVICE int* scratch() const {
    return reinterpret_cast<int*>(shared + task.scratch);
  }
  GTP_DEVICE float* mean() const {
    return reinterpret_cast<float*>(scratch() + 64);
  }

  // The row that carries original token u, or -1.
  GTP_DEVICE int carrier(int u) const {
    const int row = rep[u];
    return row >= 0 && row < rows ? row : -1;
  }
  GTP_DEVICE Range edges_of(int u) const {
    return edges_of_row(indptr, u, p.capacity);
  }
  // What edge e of a token that `row` carries leads to: another row, or -1.
  GTP_DEVICE int neighbour(int e, int row) const {
    const int column = indices[e];
    if (column < 0 || column >= origins) return -1;
    const int other = carrier(column);
    return other == row ? -1 : other;
  }
  GTP_DEVICE double importance(int i) const {
    const int64_t at = b * rows + i;
    return p.importance.dtype == DType::Float64 ? static_cast<const double*>(p.importance.data)[at]
                                                : static_cast<const float*>(p.importance.data)[at];
  }

  // The unit keys of rows i, i + step, … by a warp, and nothing yet in what the edges fill.
  template <class T>
  GTP_DEVICE void make_keys(int i, int step) const {
    for (; i < rows; i += step) {
      if (lane_id() == 0) {
        at<uint32_t>(task.key)[i] = 0;
        at<int>(task.first)[i] = -1;
      }
      float* const unit = at<float>(task.unit) + int64_t{i} * task.padded;
      const T* const k = static_cast<const T*>(p.k) + b * p.stride_k[0] + (p.prefix + i) * p.stride_k[2];
      const int size = static_cast<int>(p.head_size), heads = static_cast<int>(p.heads);
      float squares = 0;
      for (int c = 2 * lane_id(); c < task.padded; c += 2 * kLanes) {
        TwoFloats mean{{0, 0}};
        for (int h0 = 0; h0 < heads; h0 += kHeads) {
          TwoFloats x[kHeads];
          GTP_UNROLL
          for (int h = 0; h < kHeads; ++h) {
            const int count = h0 + h < heads ? (size - c < 2 ? size - c : 2) : 0;
            x[h] = load_pair(k + (h0 + h) * p.stride_k[1] + c * p.stride_k[3], p.stride_k[3], task.pairs, count);
          }
          GTP_UNROLL
          for (int h = 0; h < kHeads; ++h) {
            mean.v[0] += x[h].v[0];
            mean.v[1] += x[h].v[1];
          }
        }
        GTP_UNROLL
        for (int q = 0; q < 2; ++q) {
          const float value = c + q < size ? mean.v[q] / static_cast<float>(heads) : 0.f;
          squares = fmaf(value, value, squares);
          unit[c + q] = value;
        }
      }
      const float norm = sqrtf(sum_lanes(squares));
      const float divisor = norm == 0 ? 1.f : norm;
      for (int c = 2 * lane_id(); c < task.padded; c += 2 * kLanes) {
        unit[c] /= divisor;
        unit[c + 1] /= divisor;
      }
    }
  }

  // The edges of tokens u, u + step, … by a warp: their candidates, the best of each row, and what each row carries.
  // Lane l has edge e0 + l; a group of lanes multiplies the keys of one. The order of a list depends on the run,
  // nothing that is read off it does.
  GTP_DEVICE void weigh_edges(int u, int step) const {
    constexpr int kGroups = kLanes / kGroup;
    const float* const unit = at<float>(task.unit);
    uint64_t* const candidate = at<uint64_t>(task.candidate);
    const int group = lane_id() / kGroup, part = lane_id() % kGroup;
    for (; u < origins; u += step) {
      const int row = carrier(u);
      if (row < 0) continue;
      if (lane_id() == 0) at<int>(task.next)[u] = atomic_exchange(at<int>(task.first) + row, u);
      const float* const own = unit + int64_t{row} * task.padded;
      const Range edges = edges_of(u);
      uint32_t best = 0;
      for (int e0 = edges.begin; e0 < edges.end; e0 += kLanes) {
        const int e = e0 + lane_id(), other = e < edges.end ? neighbour(e, row) : -1;
        float cosine = 0;
        GTP_NO_UNROLL
        for (int place0 = 0; place0 < kLanes && place0 < edges.end - e0; place0 += kEdges * kGroups) {
          const float* theirs[kEdges];
          float sum[kEdges];
          GTP_UNROLL
          for (int q = 0; q < kEdges; ++q) {
            const int column = shuffle(other, place0 + q * kGroups + group);
            theirs[q] = unit + int64_t{column < 0 ? row : column} * task.padded;
            sum[q] = 0;
          }
          GTP_NO_UNROLL
          for (int c = 4 * part; c < task.padded; c += 4 * kGroup) {
            const FourFloats a = *reinterpret_cast<const FourFloats*>(own + c);
            GTP_UNROLL
            for (int q = 0; q < kEdges; ++q) {
              const FourFloats x = *reinterpret_cast<const FourFloats*>(theirs[q] + c);
              GTP_UNROLL
              for (int i = 0; i < 4; ++i) sum[q] = fmaf(a.v[i], x.v[i], sum[q]);
            }
          }
          GTP_UNROLL
          for (int q = 0; q < kEdges; ++q) {
            const int of_group = lane_id() - place0 - q * kGroups;
            const float found = shuffle(sum_lanes<kGroup>(sum[q]), lane_id() % kGroups * kGroup);
            if (of_group >= 0 && of_group < kGroups) cosine = found;
          }
        }
        const uint64_t found = other < 0 ? 0 : candidate_of(fabsf(cosine) < kInfinity ? cosine : -1.f, other);
        const uint32_t key = static_cast<uint32_t>(found >> 32);
        best = key > best ? key : best;
        if (e < edges.end) candidate[e] = found;
      }
      best = largest_of_lanes(best);
      if (lane_id() == 0 && best > 0) atomic_max(at<uint32_t>(task.key) + row, best);
    }
  }

  // The mean of the importance, by the block's first warp: one order whatever the block.
  GTP_DEVICE void take_mean() const {
    if (warp_id() > 0) return;
    double sum = 0;
    for (int i = lane_id(); i < rows; i += kLanes) sum += importance(i);
    sum = sum_lanes(sum);
    if (lane_id() == 0) *mean() = static_cast<float>(sum / rows);
  }
  GTP_DEVICE float score(int i) const {
    const uint32_t best = at<uint32_t>(task.key)[i];
    if (best == 0) return kInfinity;
    const float relative = static_cast<float>(importance(i)) / *mean();
    const float power = powf(relative > kLeastImportance ? relative : kLeastImportance, static_cast<float>(p.gamma));
    const float score = (1.f - value_of(best)) * power;
    return score == score ? score : kInfinity;
  }

  GTP_DEVICE void begin_walk() const {
    const int64_t of_image = b * p.tokens + p.prefix;
    for (int i = static_cast<int>(threadIdx.x); i < rows; i += static_cast<int>(blockDim.x)) {
      at<int>(task.into)[i] = kStays;
      at<double>(task.total)[i] = p.sizes[of_image + i];
    }
  }

  // One warp, from the end of the order on. At most n - P rows become targets: then only one of those takes another.
  GTP_DEVICE void walk() const {
    const int* const order = at<int>(task.order);
    const int* const next = at<int>(task.next);
    const uint64_t* const candidate = at<uint64_t>(task.candidate);
    int* const into = at<int>(task.into);
    double* const total = at<double>(task.total);
    const int prop = static_cast<int>(p.prop);
    int left = 0, targets = 0;
    for (int i0 = rows - 1; i0 >= 0 && left < prop; i0 -= kLanes) {
      // Each lane fetches what the walk needs of one row.
      const int own_row = i0 >= lane_id() ? order[i0 - lane_id()] : -1;
      const int own_token = own_row >= 0 ? at<int>(task.first)[own_row] : -1;
      const Range own_edges = own_token >= 0 ? edges_of(own_token) : Range{0, 0};
      const int own_next = own_token >= 0 ? next[own_token] : -1;
      const float own_size = own_row >= 0 ? p.sizes[b * p.tokens + p.prefix + own_row] : 0;
      for (int turn = 0; turn < kLanes && turn <= i0 && left < prop; ++turn) {
        const int row = shuffle(own_row, turn);
        if (into[row] != kStays) continue;
        const bool full = targets == task.kept;
        Range edges{shuffle(own_edges.begin, turn), shuffle(own_edges.end, turn)};
        int token = shuffle(own_next, turn);
        uint64_t most = 0;
        for (;;) {
          for (int e = edges.begin + lane_id(); e < edges.end; e += kLanes) {
            const uint64_t found = candidate[e];
            if (found <= most || row_of(found) == row) continue;
            const int state = into[row_of(found)];
            if (state == kTarget || (state == kStays && !full)) most = found;
          }
          if (token < 0) break;
          edges = edges_of(token);
          token = next[token];
        }
        most = largest_of_lanes(most);
        if (most == 0) continue;
        const float size = shuffle(own_size, turn);
        const int other = row_of(most);
        targets += into[other] == kStays;
        ++left;
        sync_warp();  // all lanes have read what one of them writes
        if (lane_id() == 0) {
          into[row] = other;
          into[other] = kTarget;
          total[other] += size;
        }
        sync_warp();
      }
    }
    sync_warp();  // all lanes have read what others write
    for (int i0 = rows - 1; i0 >= 0 && left < prop; i0 -= kLanes) {
      const int row = i0 >= lane_id() ? order[i0 - lane_id()] : -1;
      const bool drops = row >= 0 && into[row] == kStays;
      const unsigned votes = ballot(drops);
      if (drops && left + count_bits(votes & ((1u << lane_id()) - 1)) < prop) into[row] = kDropped;
      left += count_bits(votes);
    }
  }

  // All results, after sync_block.
  GTP_DEVICE void write() const {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int* const into = at<int>(task.into);
    const double* const total = at<double>(task.total);
    int* const place = at<int>(task.order);  // of a row that stays its place among those, of another -1 - its own
    const float* const sizes = p.sizes + b * p.tokens;
    float* const sizes_out = p.sizes_out + b * (p.prefix + task.kept);
    for (int r = thread; r < p.prefix; r += threads) sizes_out[r] = sizes[r];
    int stayed = 0, turn = 0;
    for (int i0 = 0; i0 < rows; i0 += threads) {
      const int i = i0 + thread;
      const bool inside = i < rows, stays = inside && into[i] <= kStays;
      const unsigned votes = ballot(stays);
      const BlockSum sum = sum_warps(count_bits(votes), scratch(), turn++);
      const int before = stayed + sum.before + count_bits(votes & ((1u << lane_id()) - 1));
      if (stays) {
        place[i] = before;
        p.index_kept[b * task.kept + before] = p.prefix + i;
        sizes_out[p.prefix + before] = static_cast<float>(total[i]);
      } else if (inside) {
        place[i] = before - i - 1;
        p.index_prop[b * p.prop + i - before] = p.prefix + i;
      }
      stayed += sum.total;
    }
    sync_block();
    const auto holder_of = [=](int i) { return into[i] <= kStays ? i : into[i]; };
    for (int i = thread; i < rows; i += threads) {
      const int holder = holder_of(i);
      const double size = sizes[p.prefix + i];
      p.share[b * rows + i] = holder < 0 ? 0.f : static_cast<float>(size / total[holder]);
      if (place[i] < 0) p.target[b * p.prop - 1 - place[i]] = holder < 0 ? -1 : place[holder];
    }
    for (int u = thread; u < origins; u += threads) {
      const int row = carrier(u), holder = row < 0 ? -1 : holder_of(row);
      p.rep_out[b * origins + u] = holder < 0 ? -1 : place[holder];
    }
  }
};

// grid: images.
template <class T>
GTP_GLOBAL(kImageThreads, 1)
select_kernel(GTP_CONSTANT Task task) {
  GTP_SHARED(shared);
  const Image image(task, shared, blockIdx.x);
  if (task.one_launch && task.params.prop > 0) {
    constexpr int kAll = kImageThreads / kLanes;
    image.template make_keys<T>(warp_id(), kAll);
    image.take_mean();
    sync_block();
    image.weigh_edges(warp_id(), kAll);
    sync_block();
    uint32_t* const keys = image.template at<uint32_t>(task.key);
    fill_keys(keys, task.rows, [&](int i) { return image.score(i); });
    sync_block();
    int* const order = image.template at<int>(task.order);
    select_in_block(Keys{keys, nullptr}, task.rows, task.rows, false, image.scratch(),
                    [&](int i, int rank) { order[rank] = i; });
  }
  image.begin_walk();
  sync_block();
  if (warp_id() == 0) image.walk();
  sync_block();
  image.write();
}

// grid: images x blocks, a warp for each row.
template <class T>
GTP_GLOBAL(kThreads, 4)
key_kernel(GTP_CONSTANT Task task) {
  const Image image(task, nullptr, blockIdx.x / static_cast<unsigned>(task.blocks));
  const int block = static_cast<int>(blockIdx.x % static_cast<unsigned>(task.blocks));
  image.template make_keys<T>(block * kWarps + warp_id(), task.blocks * kWarps);
}

}  // namespace live
}  // namespace cuda
}  // namespace gtp
