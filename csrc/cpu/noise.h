// Noise of many blocks of a stream at a time. Internal to kernels_body.h.
#pragma once

#include "cpu/resample.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

constexpr int32_t kQuadsAtOnce = 64;

// Products of the lower halves of 64-bit lanes. Compilers do not find the instruction themselves.
typedef uint64_t Wide __attribute__((vector_size(kVectorFloats * 4), aligned(4), may_alias));

inline Wide multiply_low(Wide a, uint32_t b) {
#if defined(__AVX512F__)
  // All lanes by a mask: gcc 12 warns of its own _mm512_mul_epu32.
  return (Wide)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (Wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

// philox4x32 in every lane; the lanes' upper halves hold rubbish, before and after.
inline void philox_lanes(const Stream& s, Wide index, Wide (&c)[4]) {
  const Wide zero{};
  c[0] = index;
  c[1] = zero + s.epoch;
  c[2] = zero + s.id_low;
  c[3] = zero + s.id_high_and_stream;
  uint32_t k0 = s.k0, k1 = s.k1;
  for (int round = 0; round < 10; ++round) {
    const Wide p0 = multiply_low(c[0], 0xD2511F53u), p1 = multiply_low(c[2], 0xCD9E8D57u);
    c[0] = (p1 >> 32) ^ c[1] ^ (zero + k0);
    c[2] = (p0 >> 32) ^ c[3] ^ (zero + k1);
    c[1] = p1;
    c[3] = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// words[k][i] is word k of block blocks[i]: even and odd blocks each fill the lanes of their own.
inline void philox_blocks(const Stream& stream, const uint32_t* blocks, int32_t n,
                          uint32_t (*words)[kQuadsAtOnce]) {
  for (int32_t i = 0; i < n; i += kVectorFloats) {
    const Wide index = *reinterpret_cast<const Wide*>(blocks + i);
    Wide even[4], odd[4];
    philox_lanes(stream, index, even);
    philox_lanes(stream, index >> 32, odd);
    for (int k = 0; k < 4; ++k) {
      *reinterpret_cast<Wide*>(&words[k][i]) = (even[k] & 0xFFFFFFFFu) | odd[k] << 32;
    }
  }
}

// Four normal numbers of each block of Philox: the numbers of noise_value. `blocks` is readable and
// `out` writable for a multiple of 16 blocks.
inline void normal_quads(const Stream& stream, const uint32_t* __restrict blocks, int32_t count,
                         float* __restrict out) {
  alignas(64) uint32_t words[4][kQuadsAtOnce];
  alignas(64) float numbers[4][kQuadsAtOnce];
  for (int32_t done = 0; done < count; done += kQuadsAtOnce) {
    const int32_t n = smaller(kQuadsAtOnce, (count - done + 15) / 16 * 16);
    philox_blocks(stream, blocks + done, n, words);
    for (int k = 0; k < 4; k += 2)
      for (int32_t i = 0; i < n; ++i) {
        const Pair pair = normal_pair(words[k][i], words[k + 1][i]);
        numbers[k][i] = pair.first;
        numbers[k + 1][i] = pair.second;
      }
    for (int32_t i = 0; i < n; i += 4) {
      transpose4(&numbers[0][i], kQuadsAtOnce, out + (done + i) * 4, 4);
    }
  }
}

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
