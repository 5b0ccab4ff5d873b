// Standard normal numbers whose bits are the same everywhere: Box-Muller on Philox words, in
// single-precision additions, multiplications and square roots alone, each rounded by itself.
// Compile with -ffp-contract=off (nvcc: -fmad=false): a fused multiply-add rounds once, not twice.
// The same steps in the same order: `normal` of spcxr/ops/philox.py and of kernels/philox.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/philox.h"

namespace spcxr {

SPCXR_HD float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

SPCXR_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Horner's scheme: coefficients from the highest power down.
template <int n>
SPCXR_HD float horner(const float (&coefficients)[n], float x) {
  float sum = coefficients[0];
  for (int i = 1; i < n; ++i) sum = sum * x + coefficients[i];
  return sum;
}

// sqrt(-2 ln u) for u = (word's upper 24 bits + 1) / 2**24, in (0, 1].
SPCXR_HD float normal_radius(uint32_t word) {
  // Least relative error of ln(1 + t) / t for 1 + t in [sqrt(1/2), sqrt(2)]: 2.6e-8.
  const float log1p_over_t[] = {0.087222435f, -0.14366788f, 0.14952283f, -0.16562402f, 0.19956833f,
                                -0.25002074f, 0.33334187f,  -0.49999988f, 1.0f};
  // Exact; by way of int32, for which x86 has an instruction.
  const uint32_t bits = float_to_bits(static_cast<float>(static_cast<int32_t>(word >> 8) + 1));
  // 0x3FB504F3 is sqrt(2): the mantissa comes to [sqrt(1/2), sqrt(2)), the rest to the exponent.
  const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  const float t = bits_to_float(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float log_mantissa = t * horner(log1p_over_t, t);
  const float minus_log = static_cast<float>(24 - exponent) * 0.6931472f - log_mantissa;
  return std::sqrt(2.0f * minus_log);
}

struct Pair {
  float first, second;
};

// Two independent normal numbers from two words; their absolute values are below 5.77.
SPCXR_HD Pair normal_pair(uint32_t word0, uint32_t word1) {
  const float sine_over_x[] = {0.00015148513f, -0.0046737664f, 0.07968968f, -0.6459637f,
                               1.5707964f};
  const float cosine[] = {-2.3824918e-05f, 0.00091772486f, -0.02086269f, 0.25366932f, -1.2337005f,
                          1.0f};
  const float radius = normal_radius(word0);
  // A quarter turn is one unit: the upper two bits of word 1 count quarters, the next 24 the rest.
  const int32_t fraction = static_cast<int32_t>((word1 >> 6) & 0xFFFFFFu);
  const float x = static_cast<float>(fraction) * 5.9604645e-08f;  // 2**-24
  const float z = x * x;
  const float s = radius * (x * horner(sine_over_x, z));
  const float c = radius * horner(cosine, z);
  // Quarters 1 and 3 swap; 1 and 2 turn the first's sign, 2 and 3 the second's.
  const bool swap = static_cast<int32_t>(word1 << 1) < 0;
  const uint32_t a = float_to_bits(swap ? s : c), b = float_to_bits(swap ? c : s);
  return Pair{bits_to_float(a ^ ((word1 ^ word1 << 1) & 0x80000000u)),
              bits_to_float(b ^ (word1 & 0x80000000u))};
}

}  // namespace spcxr
