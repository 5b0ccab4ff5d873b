// Philox4x32-10 (Salmon et al., SC'11), written from the paper; host and device.
// The layout of key and counter is that of spcxr/ops/philox.py.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SPCXR_HD __host__ __device__ inline
#elif !defined(SPCXR_HD)
#define SPCXR_HD inline
#endif

namespace spcxr {

struct Words {
  uint32_t w[4];
};

SPCXR_HD uint32_t mulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

// Uniform in [0, n), or 0 when n is 0: the high word of word * n.
SPCXR_HD uint32_t below(uint32_t word, uint32_t n) { return mulhi(word, n); }

SPCXR_HD Words philox4x32(Words c, uint32_t k0, uint32_t k1) {
  constexpr uint32_t m0 = 0xD2511F53u, m1 = 0xCD9E8D57u;
  for (int round = 0; round < 10; ++round) {
    const uint32_t hi0 = mulhi(m0, c.w[0]), lo0 = m0 * c.w[0];
    const uint32_t hi1 = mulhi(m1, c.w[2]), lo1 = m1 * c.w[2];
    c = Words{{hi1 ^ c.w[1] ^ k0, lo1, hi0 ^ c.w[3] ^ k1, lo0}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

constexpr int64_t kMaxImageId = int64_t{1} << 48;

// One image's stream of words: block `index` holds words 4 * index to 4 * index + 3.
struct Stream {
  uint32_t k0, k1, epoch, id_low, id_high_and_stream;

  SPCXR_HD Words operator()(uint32_t index) const {
    return philox4x32(Words{{index, epoch, id_low, id_high_and_stream}}, k0, k1);
  }
};

SPCXR_HD Stream make_stream(int64_t seed, int64_t epoch, int64_t image_id, uint32_t stream) {
  return Stream{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                static_cast<uint32_t>(epoch), static_cast<uint32_t>(image_id),
                static_cast<uint32_t>(image_id >> 32) | stream << 16};
}

}  // namespace spcxr
