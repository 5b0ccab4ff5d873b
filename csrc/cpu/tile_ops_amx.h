// Products of tiles on AMX (AMX-TILE, AMX-BF16): two by two tiles of sums, which four loads feed.
#pragma once

#include <immintrin.h>

#include "cpu/tile_product.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

// While it lives, this thread's eight tiles are 16 rows of 64 bytes.
class TileUse {
 public:
  TileUse() { _tile_loadconfig(&kShape); }
  ~TileUse() { _tile_release(); }
  TileUse(const TileUse&) = delete;
  TileUse& operator=(const TileUse&) = delete;

  // GCC does not know that loading a tile reads memory.
  static void order_memory() { __asm__ volatile("" ::: "memory"); }

 private:
  struct Shape {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  // Constant, since GCC does not know either how much of it is read.
  static constexpr Shape kShape = {
      1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
};

// The encoder's rows go through its layers so many at a time: products are so fast that weights
// must come from the outer cache seldom. Hidden rows of ViT-B take 1.5 MB. An estimate from counted
// instructions: not yet measured.
constexpr int32_t kStrip = 256;

// Tiles 0..3 are the sums, 4 and 5 the left, 6 and 7 the right side.
template <bool kTwo>
[[gnu::noinline]] void multiply(int32_t steps, Left a, Right b, Sums c, bool add) {
  const int64_t row = a.pitch * int64_t{sizeof *a.at}, sum_row = c.pitch * int64_t{sizeof *c.at};
  TileUse::order_memory();
  if (add) {
    _tile_loadd(0, c.at, sum_row);
    _tile_loadd(1, c.at + 16, sum_row);
    if constexpr (kTwo) {
      _tile_loadd(2, c.at + 16 * c.pitch, sum_row);
      _tile_loadd(3, c.at + 16 * c.pitch + 16, sum_row);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int32_t step = 0; step < steps; ++step) {
    const uint16_t* const left = a.at + step * kDepth;
    const uint16_t* const right = b.at + step * kTile;
    _tile_loadd(4, left, row);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + b.column, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, left + 16 * a.pitch, row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c.at, sum_row);
  _tile_stored(1, c.at + 16, sum_row);
  if constexpr (kTwo) {
    _tile_stored(2, c.at + 16 * c.pitch, sum_row);
    _tile_stored(3, c.at + 16 * c.pitch + 16, sum_row);
  }
}

inline void multiply(int32_t rows, int32_t steps, Left a, Right b, Sums c, bool add) {
  if (rows > 16) {
    multiply<true>(steps, a, b, c, add);
  } else {
    multiply<false>(steps, a, b, c, add);
  }
}

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
