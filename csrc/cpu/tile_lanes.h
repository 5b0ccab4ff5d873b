// Vectors for the attention on tiles: sixteen floats, or sixteen pairs of bfloat16, the unit in
// which the hardware multiplies. Written over the compiler's vectors, which AVX-512 holds in one
// register; what these cannot say has an instruction there, and is a loop over the lanes elsewhere.
#pragma once

#include <cstdint>
#include <utility>

#include "core/normal.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace spcxr {
namespace SPCXR_ISA {
namespace {

constexpr int kLanes = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));     // pairs, the first in the lower half
typedef int32_t Places __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(64)));    // 32 bfloat16
typedef uint16_t HalfRow __attribute__((vector_size(32)));   // 16 bfloat16
typedef int16_t HalfPlaces __attribute__((vector_size(64)));

#ifdef __AVX512BF16__
constexpr __mmask16 kEvery = 0xFFFF;  // GCC warns of the unmasked instructions' own headers
#endif

constexpr Places kLane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// While it lives, subnormal numbers are 0 for this thread: on its slow path the hardware takes a
// hundred times as long for each of the smallest weights.
class WithoutSubnormals {
 public:
#ifdef __SSE2__
  WithoutSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushed); }
  ~WithoutSubnormals() { _mm_setcsr(before_); }
#else
  WithoutSubnormals() {}
#endif
  WithoutSubnormals(const WithoutSubnormals&) = delete;
  WithoutSubnormals& operator=(const WithoutSubnormals&) = delete;

 private:
  static constexpr uint32_t kFlushed = 0x8040;  // results and operands
  uint32_t before_ = 0;
};

template <typename Vector>
inline Vector load(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}
template <typename Vector>
inline void store(void* to, Vector vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}
inline Floats all(float value) { return Floats{} + value; }

inline Floats larger(Floats a, Floats b) {
#ifdef __AVX512BF16__
  return (Floats)_mm512_maskz_max_ps(kEvery, (__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// The values of the first `count` lanes, `other` in the rest.
inline Floats first(int32_t count, Floats values, float other) {
  return kLane < count ? values : all(other);
}

// 2**t with a relative error of 2.6e-6, 0 where that is subnormal. bfloat16 errs by 2e-3.
#ifdef __AVX512BF16__
inline Floats exp2(Floats t) {
  const Floats rest = (Floats)_mm512_maskz_reduce_ps(
      kEvery, (__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
inline Floats exp2(Floats t) {
  Floats rest, power;
  for (int i = 0; i < kLanes; ++i) {
    const float whole = __builtin_floorf(t[i]);
    const bool far = !(whole >= -126 && whole <= 127);
    rest[i] = far ? 0 : t[i] - whole;
    power[i] = whole < -126 ? 0 : far ? t[i] * __builtin_inff()
                                      : bits_to_float(uint32_t(int32_t(whole) + 127) << 23);
  }
#endif
  Floats value = all(0.013534168f);
  for (const float next : {0.05201146f, 0.24144275f, 0.69300383f, 1.0000026f}) {
    value = value * rest + next;
  }
#ifdef __AVX512BF16__
  return (Floats)_mm512_maskz_scalef_ps(kEvery, (__m512)value, (__m512)t);
#else
  return value * power;
#endif
}

// [low, high] as bfloat16, to nearest, ties to even; subnormal numbers become 0.
inline Halves rounded(Floats low, Floats high) {
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
  Halves halves;
  for (int i = 0; i < 2 * kLanes; ++i) {
    const float value = i < kLanes ? low[i] : high[i - kLanes];
    const uint32_t bits = float_to_bits(value), size = bits & 0x7FFFFFFFu;
    const uint32_t nearest = bits + 0x7FFFu + (bits >> 16 & 1u);
    const uint32_t small = size < 0x00800000u ? bits & 0x80000000u : nearest;
    halves[i] = uint16_t((size > 0x7F800000u ? bits | 0x400000u : small) >> 16);
  }
  return halves;
#endif
}

inline void store_apart(void* low, void* high, Halves halves) {
#ifdef __AVX512BF16__
  store(low, _mm512_maskz_extracti64x4_epi64(0xF, (__m512i)halves, 0));
  store(high, _mm512_maskz_extracti64x4_epi64(0xF, (__m512i)halves, 1));
#else
  __builtin_memcpy(low, &halves, sizeof(HalfRow));
  __builtin_memcpy(high, reinterpret_cast<const char*>(&halves) + sizeof(HalfRow), sizeof(HalfRow));
#endif
}

// Sixteen bfloat16 as the lower halves of pairs; the two floats of a pair.
inline Words widened(const uint16_t* from) {
#ifdef __AVX512BF16__
  return (Words)_mm512_maskz_cvtepu16_epi32(kEvery, load<__m256i>(from));
#else
  return __builtin_convertvector(load<HalfRow>(from), Words);
#endif
}
inline Floats even(Words pairs) { return (Floats)(pairs << 16); }
inline Floats odd(Words pairs) { return (Floats)(pairs & 0xFFFF0000u); }

template <typename Vector, typename Order>
inline Vector shuffled(Vector a, Vector b, Order order) {
#ifdef __AVX512BF16__
  if constexpr (sizeof order[0] == 4) {
    return (Vector)_mm512_permutex2var_epi32((__m512i)a, (__m512i)order, (__m512i)b);
  } else {
    return (Vector)_mm512_maskz_permutexvar_epi16(~__mmask32{}, (__m512i)order, (__m512i)a);
  }
#else
  constexpr int n = sizeof(Vector) / sizeof a[0];
  Vector result;
  for (int i = 0; i < n; ++i) result[i] = order[i] < n ? a[order[i]] : b[order[i] - n];
  return result;
#endif
}

// The pairs (first lane of low, first lane of high), ... of rounded(low, high).
inline Words paired(Halves halves) {
  constexpr HalfPlaces order{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Words)shuffled(halves, halves, order);
}

// One step of a transposition: rows `step` apart swap lanes `step` apart.
template <typename Vector>
struct Swapped {
  Vector upper, lower;
};
template <int step, typename Vector>
inline Swapped<Vector> swapped(Vector upper, Vector lower) {
  const Places high = kLane & step;
  return {shuffled(upper, lower, high != 0 ? kLane + 16 - step : kLane),
          shuffled(upper, lower, high != 0 ? kLane + 16 : kLane + step)};
}

template <int step>
inline void transpose_step(Words (&rows)[16]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if ((i & step) != 0) continue;
    const Swapped<Words> two = swapped<step>(rows[i], rows[i + step]);
    rows[i] = two.upper;
    rows[i + step] = two.lower;
  }
}
inline void transpose(Words (&rows)[16]) {
  transpose_step<8>(rows);
  transpose_step<4>(rows);
  transpose_step<2>(rows);
  transpose_step<1>(rows);
}

// Lane i: all lanes of rows[i] put together.
template <int step, typename Put>
inline void fold_step(Floats (&rows)[16], const Put& put) {
#pragma GCC unroll 8
  for (int i = 0; i < step; ++i) {
    const Swapped<Floats> two = swapped<step>(rows[i], rows[i + step]);
    rows[i] = put(two.upper, two.lower);
  }
}
template <typename Put>
inline Floats folded(const Floats* from, const Put& put) {
  Floats rows[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = from[i];
  fold_step<8>(rows, put);
  fold_step<4>(rows, put);
  fold_step<2>(rows, put);
  fold_step<1>(rows, put);
  return rows[0];
}
inline Floats row_sums(const Floats* rows) {
  return folded(rows, [](Floats a, Floats b) { return a + b; });
}
inline Floats row_maxima(const Floats* rows) {
  return folded(rows, [](Floats a, Floats b) { return larger(a, b); });
}

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
