// Numbers of tokens and rows of them, for kernels.inc alone: all is internal to one object file.
#pragma once

#include <cstring>

#include "core/views.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace spcxr {
namespace SPCXR_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorFloats = 16;
#elif defined(__AVX__)
constexpr int kVectorFloats = 8;
#else
constexpr int kVectorFloats = 4;
#endif

template <int n>
struct VectorOf {
  typedef float Type __attribute__((vector_size(n * sizeof(float)), aligned(4), may_alias));
};
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t FourPlaces __attribute__((vector_size(16)));

#ifdef __clang__
#define SPCXR_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SPCXR_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, FourPlaces{i, j, k, l})
#endif

// to[j * to_pitch + i] = from[i * from_pitch + j] for i, j < 4.
inline void transpose4(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
  const auto row = [&](int i) { return *reinterpret_cast<const Four*>(from + i * from_pitch); };
  const Four r0 = row(0), r1 = row(1), r2 = row(2), r3 = row(3);
  const Four low01 = SPCXR_SHUFFLE(r0, r1, 0, 4, 1, 5), high01 = SPCXR_SHUFFLE(r0, r1, 2, 6, 3, 7);
  const Four low23 = SPCXR_SHUFFLE(r2, r3, 0, 4, 1, 5), high23 = SPCXR_SHUFFLE(r2, r3, 2, 6, 3, 7);
  const auto put = [&](int j, Four column) {
    *reinterpret_cast<Four*>(to + j * to_pitch) = column;
  };
  put(0, SPCXR_SHUFFLE(low01, low23, 0, 1, 4, 5));
  put(1, SPCXR_SHUFFLE(low01, low23, 2, 3, 6, 7));
  put(2, SPCXR_SHUFFLE(high01, high23, 0, 1, 4, 5));
  put(3, SPCXR_SHUFFLE(high01, high23, 2, 3, 6, 7));
}

// One token type: its bits, from a float (to nearest, ties to even; NaN stays NaN) and back.
struct Float32 {
  using Bits = float;
  static Bits from(float value) { return value; }
  static float to(Bits value) { return value; }
};

struct BFloat16 {
  using Bits = uint16_t;
  static Bits from(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t nearest = bits + 0x7FFFu + (bits >> 16 & 1u);
    const uint32_t nan = bits | 0x400000u;
    return static_cast<uint16_t>((value == value ? nearest : nan) >> 16);
  }
  static float to(Bits bits) { return bits_to_float(uint32_t{bits} << 16); }
};

struct Float16 {
  using Bits = uint16_t;
  static Bits from(float value) {
    const uint32_t bits = float_to_bits(value), size = bits & 0x7FFFFFFFu;
    const uint32_t normal = (size + 0xC8000FFFu + (size >> 13 & 1u)) >> 13;  // other bias
    // Below 2**-14: adding 0.5 leaves the rounded value in the lowest bits.
    const uint32_t small = float_to_bits(bits_to_float(size) + 0.5f) - 0x3F000000u;
    const uint32_t nan = 0x7E00u | (size >> 13 & 0x3FFu);
    uint32_t half = size < 0x38800000u ? small : normal;
    half = size >= 0x477FF000u ? 0x7C00u : half;
    half = value == value ? half : nan;
    return static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
  }
  static float to(Bits half) {
    const uint32_t size = (half & 0x7FFFu) << 13;
    // Times 2**112 the exponent has the other bias, exactly; infinity and NaN keep theirs.
    const uint32_t finite = float_to_bits(bits_to_float(size) * 5.192296858534828e33f);
    const uint32_t bits = size >= 0x0F800000u ? size | 0x7F800000u : finite;
    return bits_to_float(bits | (half & 0x8000u) << 16);
  }
};

// out = pixels * scale + shift, n of them.
template <typename Token, typename Pixel>
void convert(const Pixel* __restrict pixels, int32_t n, float scale, float shift,
             typename Token::Bits* __restrict out) {
  for (int32_t i = 0; i < n; ++i) {
    out[i] = Token::from(static_cast<float>(pixels[i]) * scale + shift);
  }
}

// out = values where hidden, else what stands there.
template <typename Token>
void merge(const float* __restrict values, const uint8_t* __restrict hidden, int32_t n,
           typename Token::Bits* __restrict out) {
  for (int32_t i = 0; i < n; ++i) {
    const typename Token::Bits value = Token::from(values[i]);
    out[i] = hidden[i] ? value : out[i];
  }
}

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
