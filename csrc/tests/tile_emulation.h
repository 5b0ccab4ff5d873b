// The instructions of tile_ops_amx.h and tile_ops_avx512_bf16.h in plain C++, as Intel defines
// them: sums in float, each operation rounded to nearest, subnormal numbers taken for 0 and
// replaced by it. A product of two bfloat16 is exact in float, so that a fused multiply-add is a
// product and a sum. Use of tiles that are not configured ends the test.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/normal.h"

namespace spcxr {
namespace emulation {

inline float flushed(float value) {
  const uint32_t bits = float_to_bits(value);
  return (bits & 0x7F800000u) == 0 ? bits_to_float(bits & 0x80000000u) : value;
}

inline float product(uint16_t a, uint16_t b) {
  return flushed(bits_to_float(uint32_t{a} << 16)) * flushed(bits_to_float(uint32_t{b} << 16));
}

struct Tiles {
  bool configured = false;
  alignas(64) uint16_t data[8][16][32];

  uint16_t (&tile(int n))[16][32] {
    if (!configured) {
      std::fprintf(stderr, "a tile is used outside of a TileUse\n");
      std::exit(1);
    }
    return data[n];
  }
};
inline thread_local Tiles tiles;

inline void load_configuration(const void* from) {
  uint8_t bytes[64];
  std::memcpy(bytes, from, 64);
  tiles.configured = bytes[0] == 1 && bytes[1] == 0;
  for (int n = 0; n < 8; ++n) {
    tiles.configured &= bytes[16 + 2 * n] == 64 && bytes[17 + 2 * n] == 0 && bytes[48 + n] == 16;
  }
  for (auto& tile : tiles.data) std::memset(tile, 0, sizeof tile);
}

inline void load_tile(int n, const void* from, int64_t stride) {
  auto& tile = tiles.tile(n);
  for (int i = 0; i < 16; ++i) {
    std::memcpy(tile[i], static_cast<const char*>(from) + i * stride, 64);
  }
}

inline void store_tile(int n, void* to, int64_t stride) {
  auto& tile = tiles.tile(n);
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tile[i], 64);
}

inline void zero_tile(int n) { std::memset(tiles.tile(n), 0, sizeof tiles.data[n]); }

// TDPBF16PS: even and odd products are summed apart, then together, then to c.
inline void multiply_tiles(int c, int a, int b) {
  auto &left = tiles.tile(a), &right = tiles.tile(b);
  float sums[16][16];
  std::memcpy(sums, tiles.tile(c), sizeof sums);
  for (int m = 0; m < 16; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        even[n] = flushed(even[n] + product(left[m][2 * k], right[k][2 * n]));
        odd[n] = flushed(odd[n] + product(left[m][2 * k + 1], right[k][2 * n + 1]));
      }
    }
    for (int n = 0; n < 16; ++n) {
      sums[m][n] = flushed(flushed(sums[m][n]) + flushed(even[n] + odd[n]));
    }
  }
  std::memcpy(tiles.tile(c), sums, sizeof sums);
}

// VDPBF16PS: the odd product first.
inline __m512 dot_pairs(__m512 sum, __m512bh a, __m512bh b) {
  float sums[16];
  uint16_t left[32], right[32];
  std::memcpy(sums, &sum, sizeof sums);
  std::memcpy(left, &a, sizeof left);
  std::memcpy(right, &b, sizeof right);
  for (int n = 0; n < 16; ++n) {
    sums[n] = flushed(flushed(sums[n]) + product(left[2 * n + 1], right[2 * n + 1]));
    sums[n] = flushed(sums[n] + product(left[2 * n], right[2 * n]));
  }
  std::memcpy(&sum, sums, sizeof sums);
  return sum;
}

}  // namespace emulation
}  // namespace spcxr

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_release
#define _tile_loadd ::spcxr::emulation::load_tile
#define _tile_stored ::spcxr::emulation::store_tile
#define _tile_zero ::spcxr::emulation::zero_tile
#define _tile_dpbf16ps ::spcxr::emulation::multiply_tiles
#define _tile_loadconfig ::spcxr::emulation::load_configuration
#define _tile_release() (::spcxr::emulation::tiles.configured = false)
#define _mm512_dpbf16_ps ::spcxr::emulation::dot_pairs
