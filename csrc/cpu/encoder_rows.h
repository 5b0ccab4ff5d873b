// Rows between two products of the encoder: LayerNorm, and GELU of sixteen sums.
#pragma once

#include "core/encoder.h"
#include "cpu/tile_lanes.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

inline Floats floats(const float* from) { return load<Floats>(from); }
inline Floats floats(const uint16_t* from) { return (Floats)(widened(from) << 16); }

inline float lane_sum(Floats values) {
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) {
    values = values + shuffled(values, values, kLane ^ step);
  }
  return values[0];
}

// x times the normal distribution's function at x, to 5e-5. The polynomial in x**2 is ours, fitted
// to (function - 1/2) / x for |x| <= 4.25; beyond that the function is taken for 0 and 1.
inline Floats gelu(Floats x) {
  const Floats half = all(0.5f), top = all(4.25f * 4.25f);
  const Floats square = x * x, power = square < top ? square : top;
  Floats value = all(-2.12489249e-12f);
  for (const float next : {2.34340991e-10f, -1.16306991e-08f, 3.46494687e-07f, -6.99570046e-06f,
                           0.000102684979f, -0.00114473829f, 0.00988994259f, -0.066407986f,
                           0.39891395f}) {
    value = value * power + next;
  }
  value = larger(value * x, -half);
  return x * (half + (value < half ? value : half));
}

// The row as the next product's left side.
template <typename Element>
[[gnu::noinline]] void normalise(const Element* row, int32_t wide, const Norm& norm, uint16_t* to) {
  Floats sum{}, squares{};
  for (int32_t d = 0; d < wide; d += kLanes) sum = sum + floats(row + d);
  const float mean = lane_sum(sum) / float(wide);
  for (int32_t d = 0; d < wide; d += kLanes) {
    const Floats off = floats(row + d) - mean;
    squares = squares + off * off;
  }
  const float factor = 1.0f / __builtin_sqrtf(lane_sum(squares) / float(wide) + norm.eps);
  const auto part = [&](int32_t d) {
    return (floats(row + d) - mean) * factor * floats(norm.weight + d) + floats(norm.bias + d);
  };
  for (int32_t d = 0; d < wide; d += 2 * kLanes) store(to + d, rounded(part(d), part(d + kLanes)));
}

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
