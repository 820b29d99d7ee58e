// live_select: one launch or four, and where each array lies; live_graph: one launch.

#include "cuda/live.cuh"

#include "cuda/launch.cuh"

namespace gtp {
namespace cuda {
namespace {

using namespace live;

constexpr int kRanked = 128;  // rows that a block of rank_kernel ranks
constexpr int kTile = 2048;   // keys in shared memory at a time

// grid: images x blocks, a warp for each original token.
GTP_GLOBAL(kThreads, 3) edge_kernel(GTP_CONSTANT Task task) {
  const Image image(task, nullptr, blockIdx.x / static_cast<unsigned>(task.blocks));
  const int block = static_cast<int>(blockIdx.x % static_cast<unsigned>(task.blocks));
  image.weigh_edges(block * kWarps + warp_id(), task.blocks * kWarps);
}

// The order by falling score. grid: images x rows / kRanked; shared memory: what the mean takes, and one tile of keys.
GTP_GLOBAL(kRanked, 1) rank_kernel(GTP_CONSTANT Task task) {
  GTP_SHARED(shared);
  const Image image(task, shared, blockIdx.x);
  auto* const keys = reinterpret_cast<uint32_t*>(shared + task.shared_bytes);
  const int rows = task.rows, i = static_cast<int>(blockIdx.y * kRanked + threadIdx.x);
  image.take_mean();
  sync_block();
  const uint32_t key = i < rows ? ordered_key(image.score(i)) : 0;
  int rank = 0;
  for (int first = 0; first < rows; first += kTile) {
    const int size = rows - first < kTile ? rows - first : kTile;
    if (first > 0) sync_block();
    fill_keys(keys, size, [&](int j) { return image.score(first + j); });
    sync_block();
    rank += count_before(keys, first, static_cast<int>(padded_keys(size)), i, key);
  }
  if (i < rows) image.at<int>(task.order)[rank] = i;
}

// The parts of shared memory and of the workspace, each one after the other.
class Layout {
 public:
  explicit Layout(int64_t shared_limit) : limit_(shared_limit) {}

  bool fits(int64_t bytes) const {
    return shared_ + padded(bytes) <= limit_;
  }
  Part take(bool shared, int64_t bytes) {
    int64_t& end = shared ? shared_ : workspace_;
    const Part part{shared, end};
    end += padded(bytes);
    return part;
  }
  // Shared where it fits.
  Part take(int64_t bytes) {
    return take(fits(bytes), bytes);
  }
  static int64_t padded(int64_t bytes) {
    return (bytes + 15) / 16 * 16;
  }
  int64_t shared() const {
    return shared_;
  }
  int64_t workspace() const {
    return workspace_;
  }

 private:
  int64_t limit_, shared_ = 0, workspace_ = 0;
};

constexpr int64_t kScratchBytes = 65 * sizeof(int);

// Whether two channels of k that follow each other are one word, wherever the first is even.
bool in_pairs(const LiveSelectParams& p) {
  const auto even = [](int64_t size, int64_t stride) { return size <= 1 || stride % 2 == 0; };
  return p.stride_k[3] == 1 && reinterpret_cast<intptr_t>(p.k) % (2 * size_of(p.dtype)) == 0 &&
         even(p.batch, p.stride_k[0]) && even(p.heads, p.stride_k[1]) && even(p.tokens, p.stride_k[2]);
}

Task task_of(const LiveSelectParams& p, const Machine& m) {
  Task task;
  task.params = p;
  const int64_t rows = p.tokens - p.prefix, chosen = p.prop > 0 ? rows : 0, origins = p.prop > 0 ? p.origins : 0;
  task.rows = static_cast<int>(rows);
  task.kept = static_cast<int>(rows - p.prop);
  task.padded = static_cast<int>((p.head_size + 3) / 4 * 4);
  task.pairs = in_pairs(p);
  const int64_t unit = 4 * chosen * task.padded, keys = 4 * padded_keys(chosen);
  Layout layout(m.shared_bytes);
  task.scratch = static_cast<uint32_t>(layout.take(true, kScratchBytes).offset);
  const int64_t all = Layout::padded(unit) + Layout::padded(keys) + Layout::padded(4 * chosen) +
                      Layout::padded(4 * origins) + 2 * Layout::padded(4 * rows) + Layout::padded(8 * rows);
  task.one_launch = layout.fits(all);
  task.unit = layout.take(task.one_launch, unit);
  task.key = layout.take(task.one_launch, keys);
  task.first = layout.take(task.one_launch, 4 * chosen);
  task.next = layout.take(task.one_launch, 4 * origins);
  task.order = layout.take(task.one_launch, 4 * rows);
  task.into = layout.take(4 * rows);
  task.total = layout.take(8 * rows);
  const int64_t candidates = p.prop > 0 ? 8 * p.capacity : 0;
  task.candidate = layout.take(task.one_launch && layout.fits(candidates), candidates);
  task.shared_bytes = static_cast<uint32_t>(layout.shared());
  task.image_bytes = layout.workspace();
  return task;
}

// The launches before that of select_kernel, where it does not do their work too.
template <class T>
bool prepare(Task task, void* stream, Error& error) {
  if (task.one_launch || task.params.prop == 0) return true;
  const int64_t batch = task.params.batch;
  const auto grid = [&](const char* name, int64_t warps) {
    task.blocks = static_cast<int>((warps + kWarps - 1) / kWarps);
    return Launch{name, batch * task.blocks, 1, kThreads};
  };
  const Launch keys = grid("live_select: keys", task.rows);
  if (!launch(key_kernel<T>, task, keys, stream, error)) return false;
  const Launch edges = grid("live_select: edges", task.params.origins);
  if (!launch(edge_kernel, task, edges, stream, error)) return false;
  task.shared_bytes = static_cast<uint32_t>(Layout::padded(kScratchBytes));
  const int64_t tile = 4 * padded_keys(task.rows < kTile ? task.rows : kTile);
  return launch(rank_kernel, task,
                {"live_select: order", batch, (task.rows + kRanked - 1) / kRanked, kRanked,
                 static_cast<size_t>(task.shared_bytes + tile)},
                stream, error);
}

template <class T>
bool run(const Task& task, void* stream, Error& error) {
  const Launch l{"live_select", task.params.batch, 1, kImageThreads, task.shared_bytes};
  return prepare<T>(task, stream, error) && launch(select_kernel<T>, task, l, stream, error);
}

// Both directions of every edge of an image. in: the columns of the edges that lead to a row from one that it has no
// edge to, behind those of its own, in no order; counts: how many there are.
struct GraphTask {
  LiveGraphParams params;
  int32_t *in, *counts;  // [B, 2 * capacity], [B, n]
};

// grid: images. Two searches per edge, and for a row of d edges (2 d)^2 comparisons.
GTP_GLOBAL(kImageThreads, 1) graph_kernel(GTP_CONSTANT GraphTask task) {
  GTP_SHARED(shared);
  auto* const scratch = reinterpret_cast<int*>(shared);
  const LiveGraphParams& p = task.params;
  const int64_t b = blockIdx.x;
  const int count = static_cast<int>(p.count), capacity = static_cast<int>(p.capacity), room = 2 * capacity;
  const int thread = static_cast<int>(threadIdx.x), warps = kImageThreads / kLanes;
  const int32_t* const indptr = p.indptr + b * (count + 1);
  const int32_t* const indices = p.indices + b * capacity;
  int32_t* const live_indptr = p.live_indptr + b * (count + 1);
  int32_t* const live_indices = p.live_indices + b * room;
  int32_t* const in = task.in + b * room;
  int32_t* const counts = task.counts + b * count;

  const auto edges_of = [=](int i) { return edges_of_row(indptr, i, capacity); };
  const auto has_edge = [=](int from, int to) {
    Range range = edges_of(from);
    const int end = range.end;
    while (range.begin < range.end) {
      const int middle = range.begin + (range.end - range.begin) / 2;
      (indices[middle] < to ? range.begin : range.end) = indices[middle] < to ? middle + 1 : middle;
    }
    return range.begin < end && indices[range.begin] == to;
  };
  // visit(i, j) for every edge from i to j that has none back.
  const auto each_single = [=](auto visit) {
    for (int i = warp_id(); i < count; i += warps) {
      const Range edges = edges_of(i);
      for (int e = edges.begin + lane_id(); e < edges.end; e += kLanes) {
        const int j = indices[e];
        if (j >= 0 && j < count && !has_edge(j, i)) visit(i, j);
      }
    }
  };

  for (int i = thread; i < count; i += kImageThreads) counts[i] = 0;
  sync_block();
  each_single([=](int, int j) { atomic_add(counts + j, 1); });
  sync_block();
  int64_t before = 0;
  int turn = 0;
  if (thread == 0) live_indptr[0] = 0;
  for (int i0 = 0; i0 < count; i0 += kImageThreads) {
    const int i = i0 + thread;
    const Range edges = i < count ? edges_of(i) : Range{0, 0};
    const int degree = edges.end - edges.begin + (i < count ? counts[i] : 0);
    const int running = scan_lanes(degree);
    const BlockSum sum = sum_warps(shuffle(running, kLanes - 1), scratch, turn++);
    const int64_t end = before + sum.before + running;
    if (i < count) {
      live_indptr[i + 1] = static_cast<int32_t>(end < 0 ? 0 : end < room ? end : room);
      counts[i] = 0;
    }
    before += sum.total;
  }
  sync_block();
  each_single([=](int i, int j) {
    const Range edges = edges_of(j);
    const int64_t place = int64_t{live_indptr[j]} + edges.end - edges.begin + atomic_add(counts + j, 1);
    if (place < live_indptr[j + 1]) in[place] = i;
  });
  sync_block();
  for (int i = warp_id(); i < count; i += warps) {
    const Range edges = edges_of(i);
    const int begin = live_indptr[i], degree = live_indptr[i + 1] - begin, own = edges.end - edges.begin;
    const auto column_at = [=](int t) {
      return t >= degree ? 0x7fffffff : t < own ? indices[edges.begin + t] : in[begin + t];
    };
    for (int t0 = 0; t0 < degree; t0 += kLanes) {
      const int t = t0 + lane_id(), column = column_at(t);
      int place = begin;
      for (int u0 = 0; u0 < degree; u0 += kLanes) {
        const int other = column_at(u0 + lane_id());
        for (int l = 0; l < kLanes && u0 + l < degree; ++l) {
          const int theirs = shuffle(other, l);
          place += theirs < column || (theirs == column && u0 + l < t);
        }
      }
      if (t < degree) live_indices[place] = column;
    }
  }
  for (int e = live_indptr[count] + thread; e < room; e += kImageThreads) live_indices[e] = 0;
}

}  // namespace

size_t live_select_workspace(const LiveSelectParams& p) {
  Machine m;
  Error error;
  machine(m, error);  // live_select says it
  return static_cast<size_t>(p.batch * task_of(p, m).image_bytes);
}

bool live_select(const LiveSelectParams& p, void* workspace, void* stream, Error& error) {
  Machine m;
  if (!machine(m, error)) return false;
  Task task = task_of(p, m);
  task.workspace = static_cast<unsigned char*>(workspace);
  switch (p.dtype) {
    case DType::BFloat16:
      return run<BFloat16>(task, stream, error);
    case DType::Float16:
      return run<Float16>(task, stream, error);
    case DType::Float32:
      return run<float>(task, stream, error);
    default:
      std::snprintf(error.text, sizeof error.text, "the CUDA kernel live_select takes no float64");
      return false;
  }
}

size_t live_graph_workspace(const LiveGraphParams& p) {
  return static_cast<size_t>(p.batch * (2 * p.capacity + p.count)) * sizeof(int32_t);
}

bool live_graph(const LiveGraphParams& p, void* workspace, void* stream, Error& error) {
  auto* const in = static_cast<int32_t*>(workspace);
  const GraphTask task{p, in, in + p.batch * 2 * p.capacity};
  return launch(graph_kernel, task, {"live_graph", p.batch, 1, kImageThreads, 64 * sizeof(int)}, stream, error);
}

}  // namespace cuda
}  // namespace gtp
