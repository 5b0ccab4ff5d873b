// Products of tiles in AVX-512 registers (VDPBF16PS): eight rows by 32 columns of sums, 16
// registers, which ten loads feed for each pair. On a Zen 4 this is one instruction a cycle, all
// that there is; torch's own products (oneDNN) come to 85-95 % of it.
#pragma once

#include <immintrin.h>

#include "cpu/tile_lanes.h"
#include "cpu/tile_product.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

struct TileUse {
  TileUse() {}
};

inline Floats add_products(Floats sum, Words a, Words b) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// The encoder's rows go through its layers so many at a time. 32 would do while the weights come
// from the outer cache; from memory, as ViT-B's do, they must come more seldom. Hidden rows of
// ViT-B take 0.8 MB.
constexpr int32_t kStrip = 128;

template <int kHigh>
[[gnu::noinline]] void multiply_rows(int32_t steps, Left a, Right b, Sums c, bool add) {
  Floats sums[kHigh][2];
#pragma GCC unroll 8
  for (int r = 0; r < kHigh; ++r) {
    sums[r][0] = add ? load<Floats>(c.at + r * c.pitch) : Floats{};
    sums[r][1] = add ? load<Floats>(c.at + r * c.pitch + kLanes) : Floats{};
  }
  for (int32_t step = 0; step < steps; ++step) {
    for (int pair = 0; pair < kDepth / 2; ++pair) {
      const uint16_t* const right = b.at + step * kTile + pair * 2 * kLanes;
      const Words near = load<Words>(right), far = load<Words>(right + b.column);
#pragma GCC unroll 8
      for (int r = 0; r < kHigh; ++r) {
        const uint16_t* const left = a.at + r * a.pitch + step * kDepth + pair * 2;
        const Words both = Words{} + load<uint32_t>(left);
        sums[r][0] = add_products(sums[r][0], both, near);
        sums[r][1] = add_products(sums[r][1], both, far);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kHigh; ++r) {
    store(c.at + r * c.pitch, sums[r][0]);
    store(c.at + r * c.pitch + kLanes, sums[r][1]);
  }
}

// Eight rows at a time, the rest in the fewest pairs that they fit.
template <int kHigh = 8>
inline void multiply(int32_t rows, int32_t steps, Left a, Right b, Sums c, bool add) {
  for (; rows > kHigh - 2; rows -= kHigh) {
    multiply_rows<kHigh>(steps, a, b, c, add);
    a.at += kHigh * a.pitch;
    c.at += kHigh * c.pitch;
  }
  if constexpr (kHigh > 2) {
    if (rows > 0) multiply<kHigh - 2>(rows, steps, a, b, c, add);
  }
}

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
