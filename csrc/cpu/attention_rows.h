// Rows of tokens read as float and laid out for attention_product.h, for attention_body.h.
#pragma once

#include "cpu/attention_product.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

#if defined(__AVX512F__)
inline Vector widen(Float16, const uint16_t* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_maskz_cvtph_ps(0xFFFF, halves);  // GCC takes the plain one for uninitialised
}
#elif defined(__F16C__)
inline Vector widen(Float16, const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#else
inline Vector widen(Float16, const uint16_t* from) {
  Vector values;
  for (int i = 0; i < kVectorFloats; ++i) values[i] = Float16::to(from[i]);
  return values;
}
#endif

inline Vector widen(BFloat16, const uint16_t* from) {
  typedef uint16_t Halves __attribute__((vector_size(kVectorFloats * 2), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(kVectorFloats * 4)));
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16);
}

inline Vector widen(Float32, const float* from) { return vector_at(from); }

// What is done to the rows of one of q, k, v of a head on their way in: scale * (value + bias).
struct Entry {
  const float* bias;  // [dim], then zeros up to a whole vector
  float scale;
};

// One row, with zeros up to a whole vector.
template <typename Token>
void read_row(const typename Token::Bits* from, const Entry& entry, int32_t dim, float* row) {
  int32_t d = 0;
  for (; d + kVectorFloats <= dim; d += kVectorFloats) {
    vector_at(row + d) = entry.scale * (widen(Token{}, from + d) + vector_at(entry.bias + d));
  }
  if (d == dim) return;
  vector_at(row + d) = Vector{};
  for (; d < dim; ++d) row[d] = entry.scale * (Token::to(from[d]) + entry.bias[d]);
}

// One row into row `place` of panels.
inline void put_in_panels(const float* row, int32_t width, int64_t panel, float* place) {
  for (int32_t d = 0; d < width; d += kVectorFloats) {
    vector_at(place + d / kPanel * panel + d % kPanel) = vector_at(row + d);
  }
}

// kPanel rows of `width` numbers into one panel [width][kPanel].
inline void put_across(const float* rows, int32_t width, float* panel) {
  for (int32_t d = 0; d < width; d += 4) {
    for (int32_t i = 0; i < kPanel; i += 4) {
      transpose4(rows + i * width + d, width, panel + d * kPanel + i, kPanel);
    }
  }
}

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
