// Numbers of tokens and rows of them: all is internal to one object file.
#pragma once

#include <cstring>

#include "core/views.h"

#ifdef __SSE2__
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

// Asks for so many bytes ahead of their use.
inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// The sign of a number, or 0.
struct Sign {
  using Bits = int8_t;
  static Bits from(float value) { return static_cast<Bits>(value); }
};

#ifdef __AVX2__
// Sixteen numbers in whatever registers hold them: the same arithmetic, so the same bits.
#ifdef __AVX512F__
using Sixteen = __m512;

// All lanes by a mask: gcc 12 warns of its own instructions without one.
inline Sixteen load16(const uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_maskz_cvtepi32_ps(0xFFFF, _mm512_maskz_cvtepu8_epi32(0xFFFF, bytes));
}
inline Sixteen load16(const int8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_maskz_cvtepi32_ps(0xFFFF, _mm512_maskz_cvtepi8_epi32(0xFFFF, bytes));
}
inline Sixteen load16(const uint16_t* from) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_maskz_cvtepi32_ps(0xFFFF, _mm512_maskz_cvtepu16_epi32(0xFFFF, words));
}
inline Sixteen load16(const float* from) { return _mm512_loadu_ps(from); }
inline void save16(float* to, Sixteen value) { _mm512_storeu_ps(to, value); }
inline void stream16(float* to, Sixteen value) { _mm512_stream_ps(to, value); }
inline Sixteen all16(float value) { return _mm512_set1_ps(value); }
inline Sixteen times(Sixteen a, Sixteen b) { return _mm512_mul_ps(a, b); }
inline Sixteen plus(Sixteen a, Sixteen b) { return _mm512_add_ps(a, b); }

// Where `cells` is not 0: the value; elsewhere what stands there.
inline void save16_where(const uint8_t* cells, float* to, Sixteen value) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(cells));
  save16(to, _mm512_mask_mov_ps(load16(to), _mm_test_epi8_mask(bytes, bytes), value));
}

// As BFloat16::from. Without kNan the value is finite, infinite or the NaN that arithmetic makes,
// which rounding leaves alone.
template <bool kNan>
inline __m256i pack16(BFloat16, Sixteen value) {
#ifdef __AVX512BF16__
  // The instruction takes subnormal numbers for 0, which is not what the others do.
  if (__builtin_expect(_mm512_fpclass_ps_mask(value, 0x20) == 0, 1)) {
    return (__m256i)_mm512_cvtneps_pbh(value);
  }
#endif
  const __m512i bits = _mm512_castps_si512(value), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(0xFFFF, bits, 16), one);
  __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  if (kNan) {
    const __m512i nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    nearest = _mm512_mask_mov_epi32(nearest, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), nan);
  }
  return _mm512_maskz_cvtepi32_epi16(0xFFFF, _mm512_maskz_srli_epi32(0xFFFF, nearest, 16));
}

template <bool kNan>
inline __m256i pack16(Float16, Sixteen value) {
  return _mm512_maskz_cvtps_ph(0xFFFF, value, _MM_FROUND_TO_NEAREST_INT);
}
#else
struct Sixteen {
  __m256 low, high;
};

inline __m256 load8(const uint8_t* from) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight));
}
inline __m256 load8(const int8_t* from) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
}
inline __m256 load8(const uint16_t* from) {
  const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(eight));
}
inline __m256 load8(const float* from) { return _mm256_loadu_ps(from); }

template <typename Number>
inline Sixteen load16(const Number* from) {
  return {load8(from), load8(from + 8)};
}
inline void save16(float* to, Sixteen value) {
  _mm256_storeu_ps(to, value.low);
  _mm256_storeu_ps(to + 8, value.high);
}
inline void stream16(float* to, Sixteen value) {
  _mm256_stream_ps(to, value.low);
  _mm256_stream_ps(to + 8, value.high);
}
inline Sixteen all16(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Sixteen times(Sixteen a, Sixteen b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Sixteen plus(Sixteen a, Sixteen b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}

// Where `cells` is not 0: the value; elsewhere what stands there.
inline void save16_where(const uint8_t* cells, float* to, Sixteen value) {
  const auto chosen = [](__m256 old, __m256 value, const uint8_t* eight) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(eight));
    const __m256i set = _mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_setzero_si256());
    return _mm256_blendv_ps(old, value, _mm256_castsi256_ps(set));
  };
  const Sixteen old = load16(to);
  save16(to, {chosen(old.low, value.low, cells), chosen(old.high, value.high, cells + 8)});
}

// As BFloat16::from; the upper halves are the bits. Without kNan the value is finite, infinite or
// the NaN that arithmetic makes, which rounding leaves alone.
template <bool kNan>
inline __m256i nearest_bfloat16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest =
      _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  if (!kNan) return nearest;
  const __m256 nan = _mm256_or_ps(value, _mm256_castsi256_ps(_mm256_set1_epi32(0x400000)));
  const __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(nearest), nan, is_nan));
}

template <bool kNan>
inline __m256i pack16(BFloat16, Sixteen value) {
  const __m256i low = _mm256_srli_epi32(nearest_bfloat16<kNan>(value.low), 16);
  const __m256i high = _mm256_srli_epi32(nearest_bfloat16<kNan>(value.high), 16);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
}

template <bool kNan>
inline __m256i pack16(Float16, Sixteen value) {
  return _mm256_set_m128i(_mm256_cvtps_ph(value.high, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(value.low, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// Past the caches where kStreamed, which wants `to` at a multiple of 16 tokens' bytes.
template <bool kStreamed, bool kNan, typename Token>
inline void store16(Token token, Sixteen value, uint16_t* to) {
  __m256i* const place = reinterpret_cast<__m256i*>(to);
  const __m256i packed = pack16<kNan>(token, value);
  kStreamed ? _mm256_stream_si256(place, packed) : _mm256_storeu_si256(place, packed);
}
template <bool kStreamed, bool kNan>
inline void store16(Float32, Sixteen value, float* to) {
  kStreamed ? stream16(to, value) : save16(to, value);
}

// Those alone that `cells` is not 0 for.
template <bool kNan, typename Token>
inline void store16_where(const uint8_t* cells, Token token, Sixteen value, uint16_t* to) {
  __m256i* const place = reinterpret_cast<__m256i*>(to);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(cells));
  const __m256i set = _mm256_cmpgt_epi16(_mm256_cvtepu8_epi16(bytes), _mm256_setzero_si256());
  const __m256i packed = pack16<kNan>(token, value);
  _mm256_storeu_si256(place, _mm256_blendv_epi8(_mm256_loadu_si256(place), packed, set));
}
template <bool kNan>
inline void store16_where(const uint8_t* cells, Float32, Sixteen value, float* to) {
  save16_where(cells, to, value);
}
#endif

// What is read next is not in the caches any more when a call has written so much; to leave them
// out then saves the reading of every line before it is written. Measured: docs/LOG.md.
constexpr int64_t kStreamedBytes = 8 << 20;

inline bool worth_streaming(const void* to, int64_t row_bytes, int64_t bytes) {
  return bytes >= kStreamedBytes && row_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

// Streamed words are seen by other threads after this.
inline void end_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// out = pixels * scale + shift, n of them.
template <typename Token, bool kStreamed = false, typename Pixel>
inline void convert(const Pixel* __restrict pixels, int64_t n, float scale, float shift,
                    typename Token::Bits* __restrict out) {
  int64_t i = 0;
#ifdef __AVX2__
  constexpr bool kNan = Pixel(0.5f) != 0;  // a float may be any; others become the common one
  const Sixteen scales = all16(scale), shifts = all16(shift);
  for (; i + 16 <= n; i += 16) {
    store16<kStreamed, kNan>(Token{}, plus(times(load16(pixels + i), scales), shifts), out + i);
  }
#endif
  for (; i < n; ++i) out[i] = Token::from(static_cast<float>(pixels[i]) * scale + shift);
}

// out = values where hidden, else what stands there.
template <typename Token>
inline void merge(const float* __restrict values, const uint8_t* __restrict hidden, int32_t n,
                  typename Token::Bits* __restrict out) {
  int32_t i = 0;
#ifdef __AVX2__
  for (; i + 16 <= n; i += 16) {
    store16_where<true>(hidden + i, Token{}, load16(values + i), out + i);
  }
#endif
  for (; i < n; ++i) {
    const typename Token::Bits value = Token::from(values[i]);
    out[i] = hidden[i] ? value : out[i];
  }
}

inline size_t token_size(TokenType type) { return type == TokenType::kFloat32 ? 4 : 2; }

// Calls with a pointer of the token's type: one of the three.
template <typename Work>
void with_type(TokenType type, void* tokens, const Work& work) {
  if (type == TokenType::kFloat32) {
    work(Float32{}, static_cast<float*>(tokens));
  } else if (type == TokenType::kBFloat16) {
    work(BFloat16{}, static_cast<uint16_t*>(tokens));
  } else {
    work(Float16{}, static_cast<uint16_t*>(tokens));
  }
}

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
