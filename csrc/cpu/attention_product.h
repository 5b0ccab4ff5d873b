// Products of small matrices of float, and the exponential between them: the arithmetic of
// attention_body.h.
#pragma once

#include "cpu/lanes.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

using Vector = VectorOf<kVectorFloats>::Type;
typedef int32_t VectorBits __attribute__((vector_size(kVectorFloats * sizeof(float))));

inline Vector& vector_at(float* place) { return *reinterpret_cast<Vector*>(place); }
inline const Vector& vector_at(const float* place) {
  return *reinterpret_cast<const Vector*>(place);
}

// A tile of sums that fills the registers: so many rows of two vectors.
constexpr int kTileRows = kVectorFloats == 16 ? 12 : 6;
constexpr int kPanel = 2 * kVectorFloats;

inline int32_t round_up(int32_t n, int32_t step) { return (n + step - 1) / step * step; }

// c [rows, vectors * kVectorFloats] = a b, or += where `add`. b stands in panels: kPanel columns of
// all its rows, one row after the other.
struct Product {
  const float* a;  // [rows, depth], or across: [depth, rows]
  int64_t a_pitch;
  const float* b;
  int64_t b_panel;  // from one panel to the next
  float* c;
  int64_t c_pitch;
  int32_t rows, vectors, depth;
  bool add;
};

template <bool across, int rows, int vectors>
void tile(const Product& g, const float* a, const float* b, float* c) {
  Vector sum[rows][vectors];
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      sum[i][v] = g.add ? vector_at(c + i * g.c_pitch + v * kVectorFloats) : Vector{};
    }
  }
  const int64_t pitch = g.a_pitch;
  for (int32_t p = 0; p < g.depth; ++p, b += kPanel) {
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      const Vector factor = a[across ? i : i * pitch] - Vector{};
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[i][v] += factor * vector_at(b + v * kVectorFloats);
    }
    a += across ? pitch : 1;
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) vector_at(c + i * g.c_pitch + v * kVectorFloats) = sum[i][v];
  }
}

using Tile = void (*)(const Product& g, const float* a, const float* b, float* c);

// tile<across, rows, vectors> at [rows - 1][vectors - 1].
template <bool across>
struct Tiles {
  Tile of[kTileRows][2];

  template <int rows = kTileRows>
  constexpr void fill() {
    of[rows - 1][0] = tile<across, rows, 1>;
    of[rows - 1][1] = tile<across, rows, 2>;
    if constexpr (rows > 1) fill<rows - 1>();
  }
  constexpr Tiles() : of() { fill(); }
};

template <bool across>
constexpr Tiles<across> kTiles;

// Part `k` of n things cut into parts of nearly equal size.
struct Part {
  int32_t begin, size;
};

inline Part part(int32_t n, int32_t parts, int32_t k) {
  const auto edge = [&](int32_t at) { return static_cast<int32_t>(int64_t{n} * at / parts); };
  return Part{edge(k), edge(k + 1) - edge(k)};
}

template <bool across>
void multiply_tile(const Product& g, const Part& rows, int32_t panel) {
  const int32_t vectors = smaller(g.vectors - 2 * panel, 2);
  kTiles<across>.of[rows.size - 1][vectors - 1](
      g, g.a + rows.begin * (across ? 1 : g.a_pitch), g.b + panel * g.b_panel,
      g.c + rows.begin * g.c_pitch + panel * kPanel);
}

// A panel of b stays in the nearest cache while a passes by.
inline void multiply(const Product& g) {
  const int32_t groups = (g.rows + kTileRows - 1) / kTileRows, panels = (g.vectors + 1) / 2;
  for (int32_t panel = 0; panel < panels; ++panel) {
    for (int32_t k = 0; k < groups; ++k) multiply_tile<false>(g, part(g.rows, groups, k), panel);
  }
}

// As above, a read across: now it is a few columns of a that stay.
inline void multiply_across(const Product& g) {
  const int32_t groups = (g.rows + kTileRows - 1) / kTileRows, panels = (g.vectors + 1) / 2;
  for (int32_t k = 0; k < groups; ++k) {
    for (int32_t panel = 0; panel < panels; ++panel) {
      multiply_tile<true>(g, part(g.rows, groups, k), panel);
    }
  }
}

constexpr float kLog2E = 1.44269504088896341f;

// exp(x) to 1e-7 of it for x <= 88; 0 below -87.6, -infinity too; NaN stays NaN.
inline Vector exponential(Vector x) {
  const Vector in_range = x * kLog2E;
  const Vector power = in_range < -127.0f ? Vector{} - 127.0f : in_range;
  // Adding this leaves the nearest whole number, plus the exponent's bias, in the lowest bits.
  constexpr float kWhole = 12582912.0f + 127.0f;
  const Vector shifted = power + kWhole;
  const Vector rest = power - (shifted - kWhole);
  Vector sum = rest * 0x1.41d334p-13f + 0x1.5f456ap-10f;
  sum = sum * rest + 0x1.3b2dbcp-7f;
  sum = sum * rest + 0x1.c6aed4p-5f;
  sum = sum * rest + 0x1.ebfbdap-3f;
  sum = sum * rest + 0x1.62e43p-1f;
  sum = sum * rest + 1.0f;
  return sum * (Vector)((VectorBits)shifted << 23);
}

// The four quarters', then the halves' and the pairs' numbers joined by `join`.
template <typename Join>
float fold(const Vector& v, const Join& join) {
  const Four* const quarters = reinterpret_cast<const Four*>(&v);
  Four four = quarters[0];
#pragma GCC unroll 4
  for (int i = 1; i < kVectorFloats / 4; ++i) four = join(four, quarters[i]);
  four = join(four, SPCXR_SHUFFLE(four, four, 2, 3, 0, 1));
  four = join(four, SPCXR_SHUFFLE(four, four, 1, 0, 3, 2));
  return four[0];
}

inline float sum_of(const Vector& v) {
  return fold(v, [](Four a, Four b) { return a + b; });
}
inline float most_of(const Vector& v) {
  return fold(v, [](Four a, Four b) { return a > b ? a : b; });
}

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
