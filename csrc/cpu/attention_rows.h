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

// One row, with zeros up to a whole vector, into a row of panels; panels of kPanel are plain rows.
template <typename Token>
void read_row(const typename Token::Bits* from, const Entry& entry, int32_t dim, float* row,
              int64_t panel = kPanel) {
  const auto place = [&](int32_t d) { return row + d / kPanel * panel + d % kPanel; };
  int32_t d = 0;
  for (; d + kVectorFloats <= dim; d += kVectorFloats) {
    __builtin_prefetch(from + dim + d);  // most often the next head's row
    vector_at(place(d)) = entry.scale * (widen(Token{}, from + d) + vector_at(entry.bias + d));
  }
  if (d == dim) return;
  float* const rest = place(d);
  vector_at(rest) = Vector{};
  for (int32_t i = 0; d + i < dim; ++i) {
    rest[i] = entry.scale * (Token::to(from[d + i]) + entry.bias[d + i]);
  }
}

// One row into a row of panels.
inline void put_in_panels(const float* row, int32_t width, int64_t panel, float* place) {
  for (int32_t d = 0; d < width; d += kVectorFloats) {
    vector_at(place + d / kPanel * panel + d % kPanel) = vector_at(row + d);
  }
}

// Four columns of eight rows into four rows.
inline void transpose8(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
#ifdef __AVX__
  const auto rows = [&](int i) {  // i and i + 4
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + i * from_pitch)),
                                _mm_loadu_ps(from + (i + 4) * from_pitch), 1);
  };
  const __m256 r0 = rows(0), r1 = rows(1), r2 = rows(2), r3 = rows(3);
  const __m256 low01 = _mm256_unpacklo_ps(r0, r1), high01 = _mm256_unpackhi_ps(r0, r1);
  const __m256 low23 = _mm256_unpacklo_ps(r2, r3), high23 = _mm256_unpackhi_ps(r2, r3);
  _mm256_storeu_ps(to, _mm256_shuffle_ps(low01, low23, 0x44));
  _mm256_storeu_ps(to + to_pitch, _mm256_shuffle_ps(low01, low23, 0xEE));
  _mm256_storeu_ps(to + 2 * to_pitch, _mm256_shuffle_ps(high01, high23, 0x44));
  _mm256_storeu_ps(to + 3 * to_pitch, _mm256_shuffle_ps(high01, high23, 0xEE));
#else
  transpose4(from, from_pitch, to, to_pitch);
  transpose4(from + 4 * from_pitch, from_pitch, to + 4, to_pitch);
#endif
}

// kPanel rows of `width` numbers into one panel [width][kPanel].
inline void put_across(const float* rows, int32_t width, float* panel) {
  for (int32_t d = 0; d < width; d += 4) {
    for (int32_t i = 0; i < kPanel; i += 8) {
      transpose8(rows + i * width + d, width, panel + d * kPanel + i, kPanel);
    }
  }
}

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
