// Products of bfloat16 tiles. tile_ops_amx.h and tile_ops_avx512_bf16.h each define
//   multiply(rows, steps, a, b, c, add): c [rows, 32] = (add ? c : 0) + a [rows, 32 * steps] x b,
// rows in 1..32 and rounded up to what they work in, an even number up to 16 or 32; and TileUse,
// which lives as long as a thread multiplies; and kStrip, rows of the encoder's layers.
#pragma once

#include <cstdint>

namespace spcxr {
namespace SPCXR_ISA {
namespace {

constexpr int32_t kBlock = 32;   // rows and columns of a product
constexpr int32_t kDepth = 32;   // products that go into a sum in one step
constexpr int32_t kTile = 512;   // elements of a tile of b: [16 pairs of rows][16 columns][2]

struct Left {
  const uint16_t* at;
  int64_t pitch;  // elements from a row to the next
};
// Two columns of tiles; a column's steps follow one another.
struct Right {
  const uint16_t* at;
  int64_t column;  // elements from a column to the next
};
struct Sums {
  float* at;
  int64_t pitch;
};

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
