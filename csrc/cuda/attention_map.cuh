// The softmax map of one (image, head) in fragments of tensor-core products: what both forms of the attention share.
//
// A warp owns 16 queries. Against 8 keys (a tile) each lane holds four values of the map: with g = lane / 4 and
// t = lane % 4 those of queries g and g + 8 and keys 2t and 2t + 1, in the order (g, 2t), (g, 2t + 1), (g + 8, 2t),
// (g + 8, 2t + 1).
#pragma once

#include "cuda/attention_threshold.cuh"
#include "cuda/kernels.h"
#include "cuda/warp.cuh"

namespace gtp {
namespace cuda {

// The arguments as the kernels want them.
struct MapParams {
  AttentionParams a;
  float scale_log2 = 1;                 // logits are to the base 2
  bool vectors[3] = {};                 // q, k, v: rows of whole, aligned 16-byte vectors
  unsigned heads = 0, image_heads = 1;  // of all images, of one
  uint32_t image_factor = 1;            // 1 / image_heads, with image_shift, for image_of
  int image_shift = 0;
  unsigned char* workspace = nullptr;
  int row_blocks = 0, room = 0;  // of one head: blocks of queries, candidates for the threshold
  int wanted = 0;                // the rank of the threshold in the map as the kernel holds it
  SampleRanks ranks;             // and in its sample

  // The image of a head of all images: its number divided by image_heads.
  GTP_DEVICE unsigned image_of(unsigned head) const {
    return (static_cast<uint32_t>(static_cast<uint64_t>(image_factor) * head >> 32) + head) >> image_shift;
  }
};
// A division of numbers below 2^31 as a product (Granlund and Montgomery, 1994).
inline void set_image_heads(MapParams& p, unsigned heads) {
  p.image_heads = heads;
  p.image_shift = 0;
  while ((uint64_t{1} << p.image_shift) < heads) ++p.image_shift;
  p.image_factor = static_cast<uint32_t>((((uint64_t{1} << p.image_shift) - heads) << 32) / heads + 1);
}

// Rows of kSize values of 16 bits in shared memory, so placed that the 8 rows that an instruction reads are in 8
// different groups of banks.
template <int kSize>
struct Tile {
  static constexpr bool kSwizzled = kSize % 64 == 0;
  static constexpr int kStride = kSwizzled ? kSize : kSize + 8;
  static constexpr int kChunks = kSize / 8;
  static constexpr int kRowBytes = 2 * kStride;
  static constexpr GTP_HOST_DEVICE size_t bytes(int rows) {
    return static_cast<size_t>(rows) * kStride * 2;
  }

  // Where in a row its 8 values `chunk` are, in bytes; the row by its last three bits.
  static GTP_DEVICE int place(int row, int chunk) {
    return 16 * (kSwizzled ? chunk ^ (row & 7) : chunk);
  }

  // Rows first .. first + rows of a [tokens, size] array, by all threads; zeros beyond the array. With vectors by
  // asynchronous copies, which the caller commits and waits for.
  static GTP_DEVICE void load(unsigned char* tile, int rows, const void* source, int64_t stride_row,
                              int64_t stride_size, bool vectors, int64_t first, int64_t tokens, int size) {
    const int threads = static_cast<int>(blockDim.x);
    GTP_NO_UNROLL
    for (int i = static_cast<int>(threadIdx.x); i < rows * kChunks; i += threads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool inside = first + row < tokens && chunk * 8 < size;
      const uint16_t* const from =
          static_cast<const uint16_t*>(source) + (inside ? (first + row) * stride_row + chunk * 8 * stride_size : 0);
      unsigned char* const to = tile + row * kRowBytes + place(row, chunk);
      if (vectors) {
        copy_async(to, from, inside);
        continue;
      }
      uint16_t* const values = reinterpret_cast<uint16_t*>(to);
      GTP_NO_UNROLL
      for (int c = 0; c < 8; ++c) {
        values[c] = inside && chunk * 8 + c < size ? from[c * stride_size] : static_cast<uint16_t>(0);
      }
    }
  }

  // The same for kRows rows from the first one on, by kThreads threads; with vectors without a loop. There are at
  // least kSure rows.
  template <int kThreads, int kRows, int kSure>
  static GTP_DEVICE void load_all(unsigned char* tile, const void* source, int64_t stride_row, int64_t stride_size,
                                  bool vectors, int tokens, int size) {
    constexpr int kStep = kThreads / kChunks;  // rows at a time
    if (kThreads % kChunks || !vectors)
      return load(tile, kRows, source, stride_row, stride_size, vectors, 0, tokens, size);
    const int thread = forget(static_cast<int>(threadIdx.x)), first = thread / kChunks, chunk = thread % kChunks;
    const uint16_t* from = static_cast<const uint16_t*>(source) + first * stride_row + chunk * 8;
    GTP_UNROLL
    for (int r = 0; r < kRows; r += kStep) {
      const int row = first + r;
      if (r + kStep <= kRows || row < kRows) {
        const bool inside = (r + kStep <= kSure || row < tokens) && chunk * 8 < size;
        copy_async(tile + row * kRowBytes + place(row, chunk), from, inside);
      }
      from += kStep * stride_row;
    }
  }
};

// The start of head `head` of all images in q, k or v.
GTP_DEVICE const void* head_of(const MapParams& p, const void* array, const int64_t (&stride)[4], unsigned head) {
  const unsigned image = p.image_of(head);
  return static_cast<const uint16_t*>(array) + image * stride[0] + (head - image * p.image_heads) * stride[1];
}

// s += q k^T for 16 rows of `q` from `row` on, a multiple of 16, and the first 8 kTiles keys of `k`, which holds whole
// pairs of tiles.
//
// What depends on the lane is computed once and here, so that an address is a register and a constant.
template <class T, int kSize, int kTiles>
GTP_DEVICE void multiply_keys(float (&s)[kTiles][4], const unsigned char* q, int row, const unsigned char* k) {
  using Rows = Tile<kSize>;
  const int lane = forget(lane_id());
  const Address queries = shared_address(q) + (row + lane % 16) * Rows::kRowBytes;
  const Address keys = shared_address(k) + (lane % 8 + lane / 16 * 8) * Rows::kRowBytes;
  GTP_UNROLL
  for (int step = 0; step < kSize / 16; ++step) {
    uint32_t a[4];
    load_matrices<false>(a, queries + Rows::place(lane % 8, 2 * step + lane / 16));
    const Address at = keys + Rows::place(lane % 8, 2 * step + lane / 8 % 2);
    GTP_UNROLL
    for (int tile = 0; tile < kTiles; tile += 2) {
      uint32_t b[4];
      load_matrices<false>(b, at + 8 * tile * Rows::kRowBytes);
      multiply(s[tile], a, b[0], b[1], T());
      if (tile + 1 < kTiles) multiply(s[tile + 1 < kTiles ? tile + 1 : 0], a, b[2], b[3], T());
    }
  }
}

// out += p v for 16 keys and dimensions 16 `first` to 16 (first + kPairs): p as two tiles of the map in the type of v,
// v from its row `row` on.
template <class T, int kSize, int kPairs>
GTP_DEVICE void multiply_values(float (&out)[2 * kPairs][4], const uint32_t (&p)[4], const unsigned char* v, int row,
                                int first) {
  using Rows = Tile<kSize>;
  const int lane = forget(lane_id());
  const Address values = shared_address(v) + lane % 16 * Rows::kRowBytes;
  GTP_UNROLL
  for (int pair = 0; pair < kPairs; ++pair) {
    uint32_t b[4];
    load_matrices<true>(b, values + Rows::place(lane % 8, 2 * (first + pair) + lane / 16) + row * Rows::kRowBytes);
    multiply(out[2 * pair], p, b[0], b[1], T());
    multiply(out[2 * pair + 1], p, b[2], b[3], T());
  }
}

// Two tiles of the map, rounded to the type of v, as the left operand of their product.
template <class T>
GTP_DEVICE void pack_tiles(uint32_t (&p)[4], const float (&left)[4], const float (&right)[4]) {
  p[0] = pack(left[0], left[1], T());
  p[1] = pack(left[2], left[3], T());
  p[2] = pack(right[0], right[1], T());
  p[3] = pack(right[2], right[3], T());
}

// log2 of the token scales of an image for keys first .. first + count; -inf beyond the tokens.
GTP_DEVICE void load_log_scales(float* log_scales, const MapParams& p, unsigned image, int64_t first, int count) {
  const float* const scales = static_cast<const float*>(p.a.token_scales.data);
  const int there = static_cast<int>(p.a.tokens - first);
  GTP_NO_UNROLL
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    float value = -kInfinity;
    if (i < there) value = scales ? log2f(scales[image * p.a.tokens + first + i]) : 0.0f;
    log_scales[i] = value;
  }
}

// Sums of columns over the 16 queries of a warp: of 4 tiles at a time, each lane gets one of their 32 columns, lane
// (g, t) column 8 (g / 2) + 2t + g % 2. Always added in the same order.
GTP_DEVICE float sum_columns(float (&u)[8]) {
  GTP_UNROLL
  for (int half = 4, mask = 16; half > 0; half /= 2, mask /= 2) {
    const bool upper = lane_id() & mask;
    GTP_UNROLL
    for (int i = 0; i < half; ++i) {
      const float mine = upper ? u[i + half] : u[i], theirs = upper ? u[i] : u[i + half];
      u[i] = mine + shuffle_xor(theirs, mask);
    }
  }
  return u[0];
}
GTP_DEVICE int column_of_lane() {
  const int g = lane_id() / 4, t = lane_id() % 4;
  return 8 * (g / 2) + 2 * t + g % 2;
}

// Writes dimensions 16 `first` to 16 (first + kPairs) of rows `row` and `row` + 8 of out [B, N, H, d].
template <class T, int kPairs>
GTP_DEVICE void store_out(const MapParams& p, unsigned head, int row, int first, const float (&out)[2 * kPairs][4]) {
  const int t = lane_id() % 4, size = forget(static_cast<int>(p.a.head_size));
  const unsigned heads = p.image_heads, image = p.image_of(head);
  const bool pairs = size % 2 == 0 && size >= 16 * (first + kPairs);
  uint16_t* const of_head = static_cast<uint16_t*>(p.a.out) +
                            (image * p.a.tokens * heads + (head - image * heads)) * p.a.head_size + 16 * first + 2 * t;
  GTP_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int n = row + 8 * half;
    if (n >= static_cast<int>(p.a.tokens)) continue;
    uint16_t* const target = of_head + static_cast<int64_t>(n) * (static_cast<int>(heads) * size);
    if (pairs) {
      GTP_UNROLL
      for (int tile = 0; tile < 2 * kPairs; ++tile) {
        *reinterpret_cast<uint32_t*>(target + 8 * tile) = pack(out[tile][2 * half], out[tile][2 * half + 1], T());
      }
      continue;
    }
    GTP_UNROLL
    for (int tile = 0; tile < 2 * kPairs; ++tile) {
      const int c = 16 * first + 8 * tile + 2 * t;
      const uint32_t pair = pack(out[tile][2 * half], out[tile][2 * half + 1], T());
      if (c + 1 < size && size % 2 == 0) {
        *reinterpret_cast<uint32_t*>(target + 8 * tile) = pair;
      } else {
        if (c < size) target[8 * tile] = static_cast<uint16_t>(pair);
        if (c + 1 < size) target[8 * tile + 1] = static_cast<uint16_t>(pair >> 16);
      }
    }
  }
}

}  // namespace cuda
}  // namespace gtp
