// Noise of many blocks of a stream at a time. Internal to kernels.inc.
#pragma once

#include "cpu/resample.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

constexpr int32_t kQuadsAtOnce = 64;

// Four normal numbers of each block of Philox: the numbers of noise_value.
inline void normal_quads(const Stream& stream, const uint32_t* __restrict blocks, int32_t count,
                         float* __restrict out) {
  uint32_t words[4][kQuadsAtOnce];
  float numbers[4][kQuadsAtOnce];
  for (int32_t done = 0; done < count; done += kQuadsAtOnce) {
    const int32_t n = smaller(kQuadsAtOnce, (count - done + 7) / 8 * 8);
    for (int32_t i = 0; i < n; ++i) {
      const Words w = stream(blocks[done + i]);
      for (int k = 0; k < 4; ++k) words[k][i] = w.w[k];
    }
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
