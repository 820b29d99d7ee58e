// The product of bfloat16 pairs on AMX tiles: 16 rows of A and 16 columns of B at a time.
//
// The packed layout is that of gemm.h: 16 pairs of depth by 16 columns of a panel are a tile as they lie in memory.
// Tiles 0 to 3 hold C, 4 and 5 hold A and B, 6 and 7 the last rows of depth, which have a shape of their own.
// GTP_EMULATE_AMX replaces the instructions by loops, so that the tests run where there is no AMX.
#pragma once

#include "vec.h"

namespace gtp {
namespace GTP_ISA {

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileConfig(int64_t rows_, int64_t tail) {
    for (int tile = 0; tile < 8; ++tile) {
      row_bytes[tile] = 64;
      rows[tile] = static_cast<uint8_t>(rows_);
    }
    rows[5] = 16;
    row_bytes[6] = static_cast<uint16_t>(tail > 0 ? 4 * tail : 64);
    rows[7] = static_cast<uint8_t>(tail > 0 ? tail : 16);
  }
};

// Of the configuration that this thread's tiles have; 0 rows: they have none. One for all sources, as the linker takes
// the template of one for the others.
struct TileShape {
  int64_t rows = 0, tail = 0;
};
inline thread_local TileShape tile_shape;

#if defined(GTP_EMULATE_AMX)
struct Tile {
  alignas(64) uint32_t row[16][16];
};
inline thread_local Tile tiles[8];
inline thread_local TileConfig tile_config(0, 0);

GTP_INLINE void tile_load_config(const TileConfig& config) {
  tile_config = config;
  for (Tile& tile : tiles) __builtin_memset(&tile, 0, sizeof tile);
}
GTP_INLINE void tile_release_all() {
  tile_config = TileConfig(0, 0);
  for (Tile& tile : tiles) __builtin_memset(&tile, 0xff, sizeof tile);
}
static void tile_load(int tile, const void* source, int64_t stride) {
  __builtin_memset(&tiles[tile], 0, sizeof(Tile));
  for (int i = 0; i < tile_config.rows[tile]; ++i) {
    __builtin_memcpy(tiles[tile].row[i], static_cast<const char*>(source) + i * stride, tile_config.row_bytes[tile]);
  }
}
static void tile_store(int tile, void* target, int64_t stride) {
  for (int i = 0; i < tile_config.rows[tile]; ++i) {
    __builtin_memcpy(static_cast<char*>(target) + i * stride, tiles[tile].row[i], tile_config.row_bytes[tile]);
  }
}
static void tile_zero(int tile) {
  __builtin_memset(&tiles[tile], 0, sizeof(Tile));
}
static void tile_multiply(int c, int a, int b) {
  const auto high = [](uint32_t pair) { return bits_as<float>(pair & 0xffff0000u); };
  const auto low = [](uint32_t pair) { return bits_as<float>(pair << 16); };
  for (int i = 0; i < tile_config.rows[c]; ++i) {
    for (int k = 0; k < tile_config.row_bytes[a] / 4; ++k) {
      const uint32_t x = tiles[a].row[i][k];
      for (int j = 0; j < 16; ++j) {
        const uint32_t y = tiles[b].row[k][j];
        const float sum = bits_as<float>(tiles[c].row[i][j]) + low(x) * low(y) + high(x) * high(y);
        tiles[c].row[i][j] = bits_as<uint32_t>(sum);
      }
    }
  }
}
#else
// The compilers' macros take the number of a tile as it is written.
GTP_INLINE void tile_load_config(const TileConfig& config) {
  // GCC's own says that 8 bytes are read, so that what is written to the others may come later, or never.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}
GTP_INLINE void tile_release_all() {
  _tile_release();
}
#define GTP_EACH_TILE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
GTP_INLINE void tile_load(int tile, const void* source, int64_t stride) {
#define GTP_TILE(t) \
  if (tile == t) _tile_loadd(t, source, stride);
  GTP_EACH_TILE(GTP_TILE)
#undef GTP_TILE
}
GTP_INLINE void tile_store(int tile, void* target, int64_t stride) {
#define GTP_TILE(t) \
  if (tile == t) _tile_stored(t, target, stride);
  GTP_EACH_TILE(GTP_TILE)
#undef GTP_TILE
}
GTP_INLINE void tile_zero(int tile) {
#define GTP_TILE(t) \
  if (tile == t) _tile_zero(t);
  GTP_EACH_TILE(GTP_TILE)
#undef GTP_TILE
}
#undef GTP_EACH_TILE
GTP_INLINE void tile_multiply(int c, int a, int) {
  if (a == 4) {
    if (c == 0) _tile_dpbf16ps(0, 4, 5);
    if (c == 1) _tile_dpbf16ps(1, 4, 5);
    if (c == 2) _tile_dpbf16ps(2, 4, 5);
    if (c == 3) _tile_dpbf16ps(3, 4, 5);
  } else {
    if (c == 0) _tile_dpbf16ps(0, 6, 7);
    if (c == 1) _tile_dpbf16ps(1, 6, 7);
    if (c == 2) _tile_dpbf16ps(2, 6, 7);
    if (c == 3) _tile_dpbf16ps(3, 6, 7);
  }
}
#endif

// For products of so many rows, whose depth leaves `tail` of 16. Loading a configuration waits for all that is under
// way, so the tiles keep theirs: a product without a tail takes that of any other.
GTP_INLINE void tile_configure(int64_t rows, int64_t tail) {
  if (tile_shape.rows == rows && (tail == 0 || tile_shape.tail == tail)) return;
  tile_shape = {rows, tail};
  tile_load_config(TileConfig(rows, tail));
}
// When the last product is done: others on this thread have configurations of their own.
GTP_INLINE void tile_release() {
  tile_shape = {};
  tile_release_all();
}

// Up to 16 rows of C by VECTORS vectors, handed to finish() like every tile of gemm.h.
template <int VECTORS, class E, class Finish>
GTP_INLINE void multiply_amx(int64_t rows, int64_t depth, const E* a, int64_t lda, const E* panel, int64_t column,
                             const Finish& finish) {
  static_assert(VECTORS <= 4, "tiles 0 to 3 hold C");
  const int64_t stride = VECTORS * 64, tail = depth % 16;
  __asm__ volatile("" ::: "memory");  // GCC does not know that tiles are loaded from memory
#pragma GCC unroll 4
  for (int j = 0; j < VECTORS; ++j) tile_zero(j);
  int64_t k = 0;
  for (; k + 16 <= depth; k += 16) {
    tile_load(4, a + k, lda * 4);
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      tile_load(5, panel + k * (VECTORS * 16) + j * 16, stride);
      tile_multiply(j, 4, 5);
    }
  }
  if (tail > 0) {
    tile_load(6, a + k, lda * 4);
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      tile_load(7, panel + k * (VECTORS * 16) + j * 16, stride);
      tile_multiply(j, 6, 7);
    }
  }
  alignas(64) float sums[16][VECTORS * 16];
#pragma GCC unroll 4
  for (int j = 0; j < VECTORS; ++j) tile_store(j, &sums[0][j * 16], sizeof sums[0]);
  for (int64_t i = 0; i < rows; ++i) {
    vfloat values[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) values[j] = load(&sums[i][j * 16]);
    finish(i, column, values);
  }
}

}  // namespace GTP_ISA
}  // namespace gtp
