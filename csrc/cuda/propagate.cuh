// propagate, and residual + selection + propagate + norm, in one launch.
//
//   y = x, or x + layer_scale * branch.  x_out = the prefix rows of y, then y_i + alpha sum_j values_ij y_j for each
//   kept i, or with live edges share_i y_i + sum_j share_j y_j over the j that go to i; rounded once, then
//   normed = norm(x_out) reads the rounded values
//
// One warp computes a row whole, with its values in registers; a block works on some rows of one image. Each block
// makes a table in shared memory of the row of x that leaves for every original token, so that 32 edges are tested at a
// time; those that count are walked in CSR order, and the y of a leaver is computed again for each.
//
// Bound by memory. Moved per output row, with s the size of an element and C channels: x and branch 2 C s read, x_out
// and normed 2 C s written, 2 C s more from cache per edge that counts; 8 bytes per edge of the row, and 2 C FLOPs per
// edge that counts. Per block, from cache: 12 C bytes of layer_scale and norm, 12 bytes per token that leaves. With
// live edges no edges are read: each row that stays compares the P targets, 8 P bytes from cache, and reads a share per
// row. With the selection as prologue, from cache: 4 to 8 bytes per head and token of the image.
#pragma once

#include "cuda/kernels.h"
#include "cuda/select.cuh"
#include "cuda/warp.cuh"

namespace gtp {
namespace cuda {

constexpr int kStepWarps = 4;
constexpr int kStepThreads = kStepWarps * kLanes;
constexpr uint16_t kStays = 0xffff;  // in the table of leavers

// Of the dynamic shared memory: where each part begins, in bytes.
struct StepLayout {
  uint32_t layer_scale = 0, weight = 0, bias = 0;  // float [C]
  uint32_t leaver = 0;                             // uint16 [origins], padded to a multiple of 8
  uint32_t scratch = 0, keys = 0, order = 0;       // selection: int [64], uint32 [n] padded, int [n]
  uint32_t bytes = 0;
};

struct StepParams {
  PropagateParams step;
  StepLayout layout;
  bool table = false;  // the table of leavers fits; without it each edge is compared with all of them
  int blocks_per_image = 1, rows_per_block = 1;
  float per_channel = 1;  // 1 / C
};

struct SelectStepParams : StepParams {
  ImportanceParams importance;
  bool by_index = false;
  int64_t *index_kept = nullptr, *index_prop = nullptr;
};

// The rows of x that stay and leave. A bad index becomes a valid one.
struct GivenIndices {
  static constexpr bool kMerge = false;
  const int64_t *index_kept, *index_prop;  // of the image
  int prefix, tokens;

  GTP_DEVICE int clamp(int64_t n) const {
    n = n < prefix ? prefix : n;
    return static_cast<int>(n < tokens ? n : tokens - 1);
  }
  GTP_DEVICE int kept(int k) const {
    return clamp(index_kept[k]);
  }
  GTP_DEVICE int leaver(int j) const {
    return clamp(index_prop[j]);
  }
};

// The same for Merge, with the row of x_out that each of those that leave goes to, and the part that each has.
struct MergedIndices : GivenIndices {
  static constexpr bool kMerge = true;
  const int64_t* target;  // of the image
  const float* share;

  GTP_DEVICE float share_of(int n) const {
    return share[n - prefix];
  }
};

struct SelectedIndices {
  static constexpr bool kMerge = false;
  const int* order;  // shared memory: the image tokens that stay, then those that leave
  int count_kept, prefix;

  GTP_DEVICE int kept(int k) const {
    return prefix + order[k];
  }
  GTP_DEVICE int leaver(int j) const {
    return prefix + order[count_kept + j];
  }
};

struct alignas(16) [[gnu::may_alias]] FourWords {
  uint32_t word[4];
};
struct alignas(8) [[gnu::may_alias]] TwoWords {
  uint32_t word[2];
};

// Four values that follow each other, as they are in memory. Where the output is float32, x and branch may be of any
// other type; where it is of a half type, they are of that type.
template <class T>
struct Four {
  uint32_t word[2];
};
template <>
struct Four<float> {
  uint32_t word[4];
};

template <class T>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr DType value = DType::Float32;
};
template <>
struct TypeOf<BFloat16> {
  static constexpr DType value = DType::BFloat16;
};
template <>
struct TypeOf<Float16> {
  static constexpr DType value = DType::Float16;
};
template <class T>
constexpr bool kIsFloat = sizeof(T) == 4;

template <class H>
GTP_DEVICE void widen_four(float (&v)[4], uint32_t low, uint32_t high, H half) {
  v[0] = widen(static_cast<uint16_t>(low), half);
  v[1] = widen(static_cast<uint16_t>(low >> 16), half);
  v[2] = widen(static_cast<uint16_t>(high), half);
  v[3] = widen(static_cast<uint16_t>(high >> 16), half);
}

template <class T>
GTP_DEVICE void unpack(float (&v)[4], const Four<T>& four, DType dtype) {
  if constexpr (kIsFloat<T>) {
    if (dtype == DType::Float32) {
      GTP_UNROLL
      for (int i = 0; i < 4; ++i) v[i] = float_of(four.word[i]);
    } else if (dtype == DType::BFloat16) {
      widen_four(v, four.word[0], four.word[1], BFloat16{});
    } else {
      widen_four(v, four.word[0], four.word[1], Float16{});
    }
  } else {
    widen_four(v, four.word[0], four.word[1], T{});
  }
}

GTP_DEVICE float load_value(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::Float64:
      return static_cast<float>(static_cast<const double*>(data)[i]);
    case DType::BFloat16:
      return widen(static_cast<const uint16_t*>(data)[i], BFloat16{});
    case DType::Float16:
      return widen(static_cast<const uint16_t*>(data)[i], Float16{});
    default:
      return static_cast<const float*>(data)[i];
  }
}
GTP_DEVICE double load_scale(const Vector& scales, int64_t i) {
  return scales.dtype == DType::Float64 ? static_cast<const double*>(scales.data)[i]
                                        : static_cast<const float*>(scales.data)[i];
}

// One image of x or branch; data is null where there is none.
struct Image {
  const unsigned char* data;
  int64_t stride_n;
  DType dtype;

  GTP_DEVICE Image(const Rows& rows, int64_t b)
      : data(static_cast<const unsigned char*>(rows.data)), stride_n(rows.stride_n), dtype(rows.dtype) {
    if (data) data += b * rows.stride_b * size_of(dtype);
  }
};

// The rows that are added to a row: what the edges begin .. end lead to, for the mean the leavers begin .. end, or for
// Merge those of them whose target is `place`. Of 32 edges each lane has one.
struct Sources {
  int begin = 0, end = 0;
  bool mean = false;
  int place = 0, own = 0;  // Merge: the row among those that are kept, and in x
  int column = -1;
  float value = 0;
};

template <class Indices>
struct StepBlock {
  const StepParams& params;
  const PropagateParams& p;
  unsigned char* const shared;
  const int b, prefix;
  const Indices indices;
  const Image x, branch;
  const bool graph, walks;

  GTP_DEVICE StepBlock(const StepParams& step, unsigned char* memory, int image, const Indices& chosen)
      : params(step),
        p(step.step),
        shared(memory),
        b(image),
        prefix(static_cast<int>(p.prefix)),
        indices(chosen),
        x(p.x, image),
        branch(p.branch, image),
        graph(p.standard == Standard::GraphProp),
        walks(graph && p.prop > 0) {}

  GTP_DEVICE float* floats(uint32_t offset) const {
    return reinterpret_cast<float*>(shared + offset);
  }
  GTP_DEVICE uint16_t* table() const {
    return reinterpret_cast<uint16_t*>(shared + params.layout.leaver);
  }
  GTP_DEVICE bool is_mean(int r) const {
    return r == prefix + static_cast<int>(p.kept);
  }
  // The row of x behind row r of x_out; of the mean, the first row that it is the mean of.
  GTP_DEVICE int source_of(int r) const {
    return r < prefix ? r : is_mean(r) ? indices.leaver(0) : indices.kept(r - prefix);
  }
  GTP_DEVICE int token_of(int n) const {
    return p.graph.token[b * (p.tokens - p.prefix) + n - prefix];
  }

  GTP_DEVICE bool has_table() const {
    return walks && params.table;
  }
  // An empty table; the leavers are entered after sync_block, for all to see after the next.
  GTP_DEVICE void clear_table() const {
    if (!has_table()) return;
    auto* const words = reinterpret_cast<FourWords*>(table());
    const int count = static_cast<int>((p.graph.origins + 7) / 8);
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kStepThreads) {
      words[i] = {{0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu}};
    }
  }
  // The first leaver that a thread enters, its row of x or -1, and the token behind it.
  GTP_DEVICE int first_leaver() const {
    return has_table() && static_cast<int>(threadIdx.x) < p.prop ? indices.leaver(static_cast<int>(threadIdx.x)) : -1;
  }
  GTP_DEVICE void enter_leavers(int n, int token) const {
    for (int j = static_cast<int>(threadIdx.x); n >= 0;) {
      if (token >= 0 && token < p.graph.origins) table()[token] = static_cast<uint16_t>(n);
      j += kStepThreads;
      n = j < p.prop ? indices.leaver(j) : -1;
      token = n >= 0 ? token_of(n) : -1;
    }
  }

  // The row of x of the leaver that was original token `column`, or -1.
  GTP_DEVICE int leaver_of(int column) const {
    if (column < 0 || column >= p.graph.origins) return -1;
    if (params.table) return table()[column] == kStays ? -1 : table()[column];
    for (int j = static_cast<int>(p.prop) - 1; j >= 0; --j) {
      const int n = indices.leaver(j);
      if (token_of(n) == column) return n;
    }
    return -1;
  }

  GTP_DEVICE void load_batch(Sources& sources, int e) const {
    sources.column = -1;
    if (sources.mean || e + lane_id() >= sources.end) return;
    if constexpr (Indices::kMerge) {
      if (indices.target[e + lane_id()] == sources.place) sources.column = e + lane_id();
      return;
    }
    sources.column = p.graph.indices[b * p.graph.capacity + e + lane_id()];
    sources.value = p.graph.values[b * p.graph.capacity + e + lane_id()];
  }
  // Without the first 32: load_batch(sources, sources.begin).
  GTP_DEVICE Sources sources_of(int r, int n, int token) const {
    Sources sources;
    if constexpr (Indices::kMerge) {
      sources.end = r >= prefix ? static_cast<int>(p.prop) : 0;
      sources.place = r - prefix;
      sources.own = n;
    } else if (is_mean(r)) {
      sources.mean = true;
      sources.begin = 1;
      sources.end = static_cast<int>(p.prop);
    } else if (walks && r >= prefix && token >= 0 && token < p.graph.origins) {
      const int* const row = p.graph.indptr + b * (p.graph.origins + 1) + token;
      const int capacity = static_cast<int>(p.graph.capacity);
      sources.begin = row[0] < 0 ? 0 : row[0] < capacity ? row[0] : capacity;
      sources.end = row[1] < capacity ? row[1] : capacity;
    }
    return sources;
  }

  // add(n, factor) in order for every row n that is added, factor alpha * value, 1 or the part that it has; how many
  // they are. moved: this lane's part of the sum of what their token scales add. Merge: before the first of them
  // weigh(factor), of the row itself.
  template <class Add, class Weigh>
  GTP_DEVICE int walk(Sources sources, double& moved, Add add, Weigh weigh) const {
    const float alpha = static_cast<float>(p.alpha);
    int count = 0;
    for (int e = sources.begin; e < sources.end; e += kLanes) {
      if (e > sources.begin) load_batch(sources, e);
      int n = -1;
      if constexpr (Indices::kMerge) {
        if (sources.column >= 0) n = indices.leaver(sources.column);
        sources.value = n >= 0 ? indices.share_of(n) : 0;
      } else if (sources.mean) {
        if (e + lane_id() < sources.end) n = indices.leaver(e + lane_id());
      } else {
        n = leaver_of(sources.column);
      }
      if (n >= 0 && p.token_scales.data) {
        moved += (sources.mean ? 1 : static_cast<double>(sources.value)) * load_scale(p.token_scales, b * p.tokens + n);
      }
      const float factor = Indices::kMerge ? sources.value : sources.mean ? 1.f : alpha * sources.value;
      unsigned hits = ballot(n >= 0);
      if constexpr (Indices::kMerge) {
        if (count == 0 && hits) weigh(indices.share_of(sources.own));
      }
      count += count_bits(hits);
      // A part of zero is none, whatever stands in the row.
      if constexpr (Indices::kMerge) hits = ballot(factor != 0);
      for (; hits; hits &= hits - 1) {
        const int lane = lowest_bit(hits);
        add(shuffle(n, lane), shuffle(factor, lane));
      }
    }
    return count;
  }

  // What a row has beside its channels: its token scale and its original token.
  GTP_DEVICE void write_rest(int r, int n, int token, int count, double moved) const {
    if (p.token_scales.data) {
      double scale = load_scale(p.token_scales, b * p.tokens + n);
      if (count > 0) scale += (is_mean(r) ? 1 : p.alpha) * sum_lanes(moved);
      const int64_t at = b * p.rows_out() + r;
      if (lane_id() == 0 && p.token_scales.dtype == DType::Float64) static_cast<double*>(p.scales_out)[at] = scale;
      if (lane_id() == 0 && p.token_scales.dtype == DType::Float32) {
        static_cast<float*>(p.scales_out)[at] = static_cast<float>(scale);
      }
    }
    if (graph && r >= prefix && lane_id() == 0) p.token_out[b * p.kept + r - prefix] = token;
  }
};

// Rows in registers: up to 128 * kChunks channels, a multiple of 4; every row of x, branch, x_out and normed begins at
// a multiple of 4 elements. Value i of chunk k of a lane is channel 128 k + 4 lane + i. kWhole: exactly so many
// channels.
template <class T, int kChunks, class Indices, bool kWhole>
struct RegisterRows {
  const StepBlock<Indices>& block;
  const PropagateParams& p;
  const int channels;
  Four<T> x[kChunks], branch[kChunks];
  float y[kChunks][4];

  GTP_DEVICE explicit RegisterRows(const StepBlock<Indices>& of)
      : block(of), p(of.p), channels(static_cast<int>(of.p.channels)) {}

  GTP_DEVICE static int channel(int chunk) {
    return 4 * (lane_id() + kLanes * chunk);
  }
  GTP_DEVICE bool has(int of_row) const {
    return kWhole || of_row < channels;
  }

  GTP_DEVICE void load(Four<T> (&target)[kChunks], const Image& image, int n) const {
    const int64_t at = n * image.stride_n;
    if constexpr (kIsFloat<T>) {
      if (image.dtype == DType::Float32) {
        const auto* const row = reinterpret_cast<const float*>(image.data) + at;
        GTP_UNROLL
        for (int k = 0; k < kChunks; ++k) {
          if (!has(channel(k))) continue;
          const FourWords four = *reinterpret_cast<const FourWords*>(row + channel(k));
          GTP_UNROLL
          for (int i = 0; i < 4; ++i) target[k].word[i] = four.word[i];
        }
        return;
      }
    }
    const auto* const row = reinterpret_cast<const uint16_t*>(image.data) + at;
    GTP_UNROLL
    for (int k = 0; k < kChunks; ++k) {
      if (!has(channel(k))) continue;
      const TwoWords two = *reinterpret_cast<const TwoWords*>(row + channel(k));
      target[k].word[0] = two.word[0];
      target[k].word[1] = two.word[1];
    }
  }
  GTP_DEVICE void load(int n) {
    load(x, block.x, n);
    if (block.branch.data) load(branch, block.branch, n);
  }

  // The y of what load(n) brought: take(k, values) for each chunk.
  template <class Take>
  GTP_DEVICE void each(Take take) const {
    const float* const layer_scale = block.floats(block.params.layout.layer_scale);
    GTP_UNROLL
    for (int k = 0; k < kChunks; ++k) {
      if (!has(channel(k))) continue;
      float value[4];
      unpack(value, x[k], block.x.dtype);
      if (block.branch.data) {
        float step[4];
        unpack(step, branch[k], block.branch.dtype);
        const FourWords scale = *reinterpret_cast<const FourWords*>(layer_scale + channel(k));
        GTP_UNROLL
        for (int i = 0; i < 4; ++i) value[i] += float_of(scale.word[i]) * step[i];
      }
      take(k, value);
    }
  }

  GTP_DEVICE void begin() {
    each([&](int k, const float (&value)[4]) {
      GTP_UNROLL
      for (int i = 0; i < 4; ++i) y[k][i] = value[i];
    });
  }
  GTP_DEVICE void add(int n, float factor) {
    load(n);
    each([&](int k, const float (&value)[4]) {
      GTP_UNROLL
      for (int i = 0; i < 4; ++i) y[k][i] += factor * value[i];
    });
  }
  GTP_DEVICE void weigh(float factor) {
    GTP_UNROLL
    for (int k = 0; k < kChunks; ++k) {
      GTP_UNROLL
      for (int i = 0; i < 4; ++i) y[k][i] *= factor;
    }
  }

  GTP_DEVICE void store(void* rows, int64_t row, int k, const float (&value)[4]) const {
    T* const target = static_cast<T*>(rows) + row * channels + channel(k);
    if constexpr (kIsFloat<T>) {
      *reinterpret_cast<FourWords*>(target) = {
          {bits_of(value[0]), bits_of(value[1]), bits_of(value[2]), bits_of(value[3])}};
    } else {
      *reinterpret_cast<TwoWords*>(target) = {{pack(value[0], value[1], T{}), pack(value[2], value[3], T{})}};
    }
  }

  // x_out, and y as it was rounded.
  GTP_DEVICE void write(int64_t row) {
    GTP_UNROLL
    for (int k = 0; k < kChunks; ++k) {
      if (!has(channel(k))) continue;
      store(p.x_out, row, k, y[k]);
      if constexpr (!kIsFloat<T>) {
        widen_four(y[k], pack(y[k][0], y[k][1], T{}), pack(y[k][2], y[k][3], T{}), T{});
      }
    }
  }
  // Row n of x as it is: a NaN keeps its bits.
  GTP_DEVICE void copy(int n, int64_t row) {
    load(x, block.x, n);
    GTP_UNROLL
    for (int k = 0; k < kChunks; ++k) {
      if (!has(channel(k))) continue;
      T* const target = static_cast<T*>(p.x_out) + row * channels + channel(k);
      *reinterpret_cast<TwoWords*>(target) = {{x[k].word[0], x[k].word[1]}};
    }
  }

  GTP_DEVICE void normalise(int64_t row) const {
    const float* const weight = block.floats(block.params.layout.weight);
    const float* const bias = block.floats(block.params.layout.bias);
    float mean = 0;
    if (p.norm == Norm::Layer) {
      GTP_UNROLL
      for (int k = 0; k < kChunks; ++k) {
        if (has(channel(k))) mean += (y[k][0] + y[k][1]) + (y[k][2] + y[k][3]);
      }
      mean = sum_lanes(mean) * block.params.per_channel;
    }
    float square = 0;
    GTP_UNROLL
    for (int k = 0; k < kChunks; ++k) {
      if (!has(channel(k))) continue;
      GTP_UNROLL
      for (int i = 0; i < 4; ++i) square += (y[k][i] - mean) * (y[k][i] - mean);
    }
    const float inverse = rsqrt_fast(sum_lanes(square) * block.params.per_channel + static_cast<float>(p.norm_eps));
    GTP_UNROLL
    for (int k = 0; k < kChunks; ++k) {
      if (!has(channel(k))) continue;
      const FourWords w = *reinterpret_cast<const FourWords*>(weight + channel(k));
      const FourWords shift = *reinterpret_cast<const FourWords*>(bias + channel(k));
      float value[4];
      GTP_UNROLL
      for (int i = 0; i < 4; ++i) {
        value[i] = (y[k][i] - mean) * inverse * float_of(w.word[i]) + float_of(shift.word[i]);
      }
      store(p.normed, row, k, value);
    }
  }

  // layer_scale and the norm's vectors: a thread has as many channels of each as a lane has chunks. They go to shared
  // memory as float, for all to see after sync_block.
  static_assert(kStepThreads == 4 * kLanes, "a thread has a channel of each chunk");
  struct Staged {
    uint32_t bits[kChunks];
  };
  GTP_DEVICE static int staged_channel(int k) {
    return static_cast<int>(threadIdx.x) + kStepThreads * k;
  }
  GTP_DEVICE void load(Staged& staged, const Vector& v, float otherwise) const {
    GTP_UNROLL
    for (int k = 0; k < kChunks; ++k) staged.bits[k] = bits_of(otherwise);
    if (!v.data) return;
    if (v.dtype == DType::Float64) {
      GTP_UNROLL
      for (int k = 0; k < kChunks; ++k) {
        if (has(staged_channel(k))) staged.bits[k] = bits_of(load_value(v.data, DType::Float64, staged_channel(k)));
      }
    } else if (v.dtype == DType::Float32) {
      GTP_UNROLL
      for (int k = 0; k < kChunks; ++k) {
        if (has(staged_channel(k))) staged.bits[k] = static_cast<const uint32_t*>(v.data)[staged_channel(k)];
      }
    } else {
      GTP_UNROLL
      for (int k = 0; k < kChunks; ++k) {
        if (has(staged_channel(k))) staged.bits[k] = static_cast<const uint16_t*>(v.data)[staged_channel(k)];
      }
    }
  }
  GTP_DEVICE void store(const Staged& staged, const Vector& v, uint32_t offset) const {
    GTP_UNROLL
    for (int k = 0; k < kChunks; ++k) {
      if (!has(staged_channel(k))) continue;
      float value = float_of(staged.bits[k]);
      if (v.data && v.dtype == DType::BFloat16) value = widen(static_cast<uint16_t>(staged.bits[k]), BFloat16{});
      if (v.data && v.dtype == DType::Float16) value = widen(static_cast<uint16_t>(staged.bits[k]), Float16{});
      block.floats(offset)[staged_channel(k)] = value;
    }
  }

  // Rows first .. last of the image. A warp waits where it first uses what it loaded: so the loads of the vectors, the
  // table and the warp's first row are all on their way before any of them is used.
  GTP_DEVICE void run(int first, int last) {
    const StepLayout& layout = block.params.layout;
    int r = first + warp_id(), n = 0, token = 0;
    Sources sources;
    const auto load_row = [&] {
      load(n);
      if (block.graph && r >= block.prefix) token = block.token_of(n);
    };
    Staged layer_scale, weight, bias;
    const bool scaled = block.branch.data != nullptr, has_norm = p.norm != Norm::None;
    if (r < last) n = block.source_of(r);
    const int leaver = block.first_leaver();
    if (scaled) load(layer_scale, p.layer_scale, 1);
    if (has_norm) load(weight, p.norm_weight, 1);
    if (has_norm) load(bias, p.norm_bias, 0);
    if (r < last) load_row();
    const int leaver_token = leaver >= 0 ? block.token_of(leaver) : -1;
    block.clear_table();
    if (scaled) store(layer_scale, p.layer_scale, layout.layer_scale);
    if (has_norm) store(weight, p.norm_weight, layout.weight);
    if (has_norm) store(bias, p.norm_bias, layout.bias);
    if (r < last) sources = block.sources_of(r, n, token);
    sync_block();
    if (r < last) block.load_batch(sources, sources.begin);
    block.enter_leavers(leaver, leaver_token);
    sync_block();
    while (r < last) {
      begin();
      double moved = 0;
      const int count = block.walk(
          sources, moved, [&](int row, float factor) { add(row, factor); }, [&](float factor) { weigh(factor); });
      block.write_rest(r, n, token, count, moved);
      if (sources.mean) {
        GTP_UNROLL
        for (int k = 0; k < kChunks; ++k) {
          GTP_UNROLL
          for (int i = 0; i < 4; ++i) y[k][i] /= static_cast<float>(p.prop);
        }
      }
      const int64_t row = block.b * p.rows_out() + r;
      write(row);
      if constexpr (!kIsFloat<T>) {
        if (!block.branch.data && count == 0 && !sources.mean) copy(n, row);
      }
      if (has_norm) normalise(row);
      r += kStepWarps;
      if (r >= last) break;
      n = block.source_of(r);
      load_row();
      sources = block.sources_of(r, n, token);
      block.load_batch(sources, sources.begin);
    }
  }
};

// Rows of any length and alignment. Value i of a lane is channel 32 i + lane of a slab of 128; the edges are walked
// once per slab, and the norm reads x_out again, each lane what it wrote itself.
template <class T, class Indices>
struct SlabRows {
  static constexpr int kValues = 4;
  const StepBlock<Indices>& block;
  const PropagateParams& p;
  const int64_t channels;
  int64_t slab = 0;
  float y[kValues];

  GTP_DEVICE explicit SlabRows(const StepBlock<Indices>& of) : block(of), p(of.p), channels(of.p.channels) {}

  GTP_DEVICE int64_t channel(int i) const {
    return slab + kLanes * i + lane_id();
  }
  GTP_DEVICE float value_of(int n, int64_t c) const {
    const float value = load_value(block.x.data, block.x.dtype, n * block.x.stride_n + c);
    if (!block.branch.data) return value;
    const float scale = p.layer_scale.data ? load_value(p.layer_scale.data, p.layer_scale.dtype, c) : 1.f;
    return value + scale * load_value(block.branch.data, block.branch.dtype, n * block.branch.stride_n + c);
  }
  GTP_DEVICE void add(int n, float factor) {
    GTP_UNROLL
    for (int i = 0; i < kValues; ++i) {
      if (channel(i) < channels) y[i] += factor * value_of(n, channel(i));
    }
  }
  GTP_DEVICE void weigh(float factor) {
    GTP_UNROLL
    for (int i = 0; i < kValues; ++i) y[i] *= factor;
  }
  GTP_DEVICE static void store(void* target, int64_t at, float value) {
    if constexpr (kIsFloat<T>) {
      static_cast<float*>(target)[at] = value;
    } else {
      static_cast<uint16_t*>(target)[at] = static_cast<uint16_t>(pack(value, 0, T{}));
    }
  }
  GTP_DEVICE float written(int64_t row, int64_t c) const {
    return load_value(p.x_out, TypeOf<T>::value, row * channels + c);
  }

  GTP_DEVICE void normalise(int64_t row) const {
    const float size = static_cast<float>(channels);
    float mean = 0;
    if (p.norm == Norm::Layer) {
      for (int64_t c = lane_id(); c < channels; c += kLanes) mean += written(row, c);
      mean = sum_lanes(mean) / size;
    }
    float square = 0;
    for (int64_t c = lane_id(); c < channels; c += kLanes) {
      const float d = written(row, c) - mean;
      square += d * d;
    }
    const float inverse = 1.f / sqrtf(sum_lanes(square) / size + static_cast<float>(p.norm_eps));
    for (int64_t c = lane_id(); c < channels; c += kLanes) {
      const float w = p.norm_weight.data ? load_value(p.norm_weight.data, p.norm_weight.dtype, c) : 1.f;
      const float shift = p.norm_bias.data ? load_value(p.norm_bias.data, p.norm_bias.dtype, c) : 0.f;
      store(p.normed, row * channels + c, (written(row, c) - mean) * inverse * w + shift);
    }
  }

  GTP_DEVICE void run(int first, int last) {
    const int leaver = block.first_leaver();
    block.clear_table();
    sync_block();
    block.enter_leavers(leaver, leaver >= 0 ? block.token_of(leaver) : -1);
    sync_block();
    for (int r = first + warp_id(); r < last; r += kStepWarps) {
      const int n = block.source_of(r);
      const int64_t row = block.b * p.rows_out() + r;
      const int token = block.graph && r >= block.prefix ? block.token_of(n) : 0;
      Sources sources = block.sources_of(r, n, token);
      block.load_batch(sources, sources.begin);
      double moved = 0;
      int count = 0;
      // Once at least: a row without channels has a token scale and a token too.
      for (slab = 0; slab == 0 || slab < channels; slab += kValues * kLanes) {
        GTP_UNROLL
        for (int i = 0; i < kValues; ++i) y[i] = channel(i) < channels ? value_of(n, channel(i)) : 0;
        double part = 0;
        count = block.walk(
            sources, part, [&](int j, float factor) { add(j, factor); }, [&](float factor) { weigh(factor); });
        if (slab == 0) moved = part;
        const bool as_it_is = !kIsFloat<T> && !block.branch.data && count == 0 && !sources.mean;
        GTP_UNROLL
        for (int i = 0; i < kValues; ++i) {
          const int64_t c = channel(i);
          if (c >= channels) continue;
          if (as_it_is) {  // a NaN keeps its bits
            static_cast<uint16_t*>(p.x_out)[row * channels + c] =
                reinterpret_cast<const uint16_t*>(block.x.data)[n * block.x.stride_n + c];
          } else {
            store(p.x_out, row * channels + c, sources.mean ? y[i] / static_cast<float>(p.prop) : y[i]);
          }
        }
      }
      block.write_rest(r, n, token, count, moved);
      if (p.norm != Norm::None) normalise(row);
    }
  }
};

// kChunks 0: rows of any length and alignment.
template <class T, int kChunks, class Indices>
struct RowsFor {
  using Type = RegisterRows<T, kChunks, Indices, false>;
};
template <class T, class Indices>
struct RowsFor<T, 0, Indices> {
  using Type = SlabRows<T, Indices>;
};

template <class T, int kChunks, class Indices>
GTP_DEVICE void run_step(const StepParams& params, unsigned char* shared, int image, int first,
                         const Indices& indices) {
  const StepBlock<Indices> block(params, shared, image, indices);
  const int end = static_cast<int>(params.step.rows_out());
  const int last = first + params.rows_per_block < end ? first + params.rows_per_block : end;
  // Whole rows need no checks; beside those of live edges there are no registers for a second copy of the code.
  if constexpr (kChunks > 0 && !Indices::kMerge) {
    if (params.step.channels == 128 * kChunks) {
      RegisterRows<T, kChunks, Indices, true> rows(block);
      rows.run(first, last);
      return;
    }
  }
  typename RowsFor<T, kChunks, Indices>::Type rows(block);
  rows.run(first, last);
}

// Blocks that a multiprocessor holds at once, by the registers that a lane's chunks take.
template <class T, int kChunks>
constexpr int blocks_at_once(int most = 7) {
  const int size = kChunks * (kIsFloat<T> ? 3 : 2);
  const int fit = size <= 4 ? 7 : size <= 6 ? 6 : size <= 9 ? 5 : size <= 12 ? 4 : size <= 18 ? 3 : 2;
  return fit < most ? fit : most;
}

// grid: images x blocks_per_image.
template <class T, int kChunks>
GTP_GLOBAL(kStepThreads, (blocks_at_once<T, kChunks>()))
propagate_kernel(GTP_CONSTANT StepParams params) {
  GTP_SHARED(shared);
  const PropagateParams& p = params.step;
  const int image = static_cast<int>(blockIdx.x) / params.blocks_per_image;
  const int part = static_cast<int>(blockIdx.x) % params.blocks_per_image;
  const GivenIndices indices{p.index_kept + image * p.kept, p.index_prop + image * p.prop, static_cast<int>(p.prefix),
                             static_cast<int>(p.tokens)};
  run_step<T, kChunks>(params, shared, image, part * params.rows_per_block, indices);
}

// Merge.
template <class T, int kChunks>
GTP_GLOBAL(kStepThreads, (blocks_at_once<T, kChunks>()))
merge_kernel(GTP_CONSTANT StepParams params) {
  GTP_SHARED(shared);
  const PropagateParams& p = params.step;
  const int image = static_cast<int>(blockIdx.x) / params.blocks_per_image;
  const int part = static_cast<int>(blockIdx.x) % params.blocks_per_image;
  const MergedIndices indices{{p.index_kept + image * p.kept, p.index_prop + image * p.prop, static_cast<int>(p.prefix),
                               static_cast<int>(p.tokens)},
                              p.target + image * p.prop,
                              p.share + image * (p.tokens - p.prefix)};
  run_step<T, kChunks>(params, shared, image, part * params.rows_per_block, indices);
}

// propagate_kernel, every block of an image choosing the tokens anew; the first one writes them down.
template <class T, int kChunks>
GTP_GLOBAL(kStepThreads, (blocks_at_once<T, kChunks>(5)))
select_propagate_kernel(GTP_CONSTANT SelectStepParams params) {
  GTP_SHARED(shared);
  const PropagateParams& p = params.step;
  const int image = static_cast<int>(blockIdx.x) / params.blocks_per_image;
  const int part = static_cast<int>(blockIdx.x) % params.blocks_per_image;
  const int count = static_cast<int>(p.tokens - p.prefix), kept = static_cast<int>(p.kept);
  auto* const keys = reinterpret_cast<uint32_t*>(shared + params.layout.keys);
  auto* const order = reinterpret_cast<int*>(shared + params.layout.order);
  auto* const scratch = reinterpret_cast<int*>(shared + params.layout.scratch);
  auto* const importance = static_cast<float*>(params.importance.importance);
  fill_keys(keys, count, [&](int i) {
    const float value = importance_of(params.importance, image, i);
    if (part == 0 && importance) importance[static_cast<int64_t>(image) * count + i] = value;
    return value;
  });
  sync_block();
  select_in_block(Keys{keys, nullptr}, count, kept, params.by_index, scratch, [&](int i, int position) {
    order[position] = i;
    if (part > 0) return;
    int64_t* const target = position < kept ? params.index_kept + image * p.kept + position
                                            : params.index_prop + image * p.prop + (position - kept);
    *target = p.prefix + i;
  });
  sync_block();
  const SelectedIndices indices{order, kept, static_cast<int>(p.prefix)};
  run_step<T, kChunks>(params, shared, image, part * params.rows_per_block, indices);
}

}  // namespace cuda
}  // namespace gtp
