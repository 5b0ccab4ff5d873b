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

// A tile of sums that fills the registers: so many rows of two vectors, or twice as many of one.
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
#pragma GCC unroll 24
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) sum[i][v] = Vector{};
  }
  const int64_t pitch = g.a_pitch;
  for (int32_t p = 0; p < g.depth; ++p, b += kPanel) {
#pragma GCC unroll 24
    for (int i = 0; i < rows; ++i) {
      const Vector factor = a[across ? i : i * pitch] - Vector{};
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[i][v] += factor * vector_at(b + v * kVectorFloats);
    }
    a += across ? pitch : 1;
  }
#pragma GCC unroll 24
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      Vector& at = vector_at(c + i * g.c_pitch + v * kVectorFloats);
      // What is there comes last: sums of short products drift less than one long sum.
      at = g.add ? at + sum[i][v] : sum[i][v];
    }
  }
}

using Tile = void (*)(const Product& g, const float* a, const float* b, float* c);

// tile<across, rows, vectors> at [rows - 1][vectors - 1].
template <bool across>
struct Tiles {
  Tile of[2 * kTileRows][2];

  template <int rows = 2 * kTileRows>
  constexpr void fill() {
    of[rows - 1][0] = tile<across, rows, 1>;
    if constexpr (rows <= kTileRows) of[rows - 1][1] = tile<across, rows, 2>;
    if constexpr (rows > 1) fill<rows - 1>();
  }
  constexpr Tiles() : of() { fill(); }
};

template <bool across>
constexpr Tiles<across> kTiles;

struct Part {
  int32_t begin, size;
};

// n things cut into as few parts as hold at most `most`, of nearly equal size.
class Cuts {
 public:
  Cuts(int32_t n, int32_t most)
      : count((n + most - 1) / most),
        size_(count > 0 ? n / count : 0),
        larger_(n - size_ * count) {}

  Part operator[](int32_t k) const {
    return Part{k * size_ + smaller(k, larger_), size_ + (k < larger_)};
  }
  const int32_t count;

 private:
  int32_t size_, larger_;  // so many have one more
};

template <bool across>
void multiply_part(const Product& g, const Part& rows, int32_t panel, int32_t vectors) {
  kTiles<across>.of[rows.size - 1][vectors - 1](
      g, g.a + rows.begin * (across ? 1 : g.a_pitch), g.b + panel * g.b_panel,
      g.c + rows.begin * g.c_pitch + panel * kPanel);
}

// The last panel, where it is only half one.
template <bool across>
void multiply_rest(const Product& g) {
  const Cuts groups(g.rows, 2 * kTileRows);
  for (int32_t k = 0; k < groups.count && g.vectors % 2 != 0; ++k) {
    multiply_part<across>(g, groups[k], g.vectors / 2, 1);
  }
}

// A panel of b stays in the nearest cache while a passes by.
inline void multiply(const Product& g) {
  const Cuts groups(g.rows, kTileRows);
  for (int32_t panel = 0; panel < g.vectors / 2; ++panel) {
    for (int32_t k = 0; k < groups.count; ++k) multiply_part<false>(g, groups[k], panel, 2);
  }
  multiply_rest<false>(g);
}

// As above, a read across: now it is a few columns of a that stay.
inline void multiply_across(const Product& g) {
  const Cuts groups(g.rows, kTileRows);
  for (int32_t k = 0; k < groups.count; ++k) {
    for (int32_t panel = 0; panel < g.vectors / 2; ++panel) {
      multiply_part<true>(g, groups[k], panel, 2);
    }
  }
  multiply_rest<true>(g);
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
