// The functions of cuda/matrix.cuh on the CPU: include this before it. Where the elements of a
// matrix lie in a warp is taken from the PTX ISA ("Matrix Fragments for mma.m16n8k16 with floating
// point type", "Warp-level matrix load instruction: ldmatrix"), not from the kernels.
#pragma once

#include "cuda_emulation.h"

#include <utility>

#include "cuda/tokens.cuh"

namespace spcxr {

#define SPCXR_DYNAMIC_SHARED(name) auto* name = reinterpret_cast<uint4*>(emulated::dynamic_shared)

inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(at) - emulated::dynamic_shared);
}
inline const unsigned char* shared_row(uint32_t address) {
  if (address % 16 != 0) std::abort();  // ldmatrix and cp.async take whole pieces
  return emulated::dynamic_shared + address;
}

template <class Token>
void multiply_add(Token, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto* words = emulated::share(a[0], a[1], a[2], a[3], b0, b1);
  float left[16][16], right[16][8];  // A [row][k], B [k][column]
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;  // groupID, threadID_in_group
    const auto element = [&](int first, int i) {       // two to a register, the low half first
      return unpack(Token{static_cast<uint16_t>(words[lane][first + i / 2] >> i % 2 * 16)});
    };
    for (int i = 0; i < 8; ++i) {
      const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
      const int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
      left[row][column] = element(0, i);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
      right[row][group] = element(4, i);
    }
  }
  const int group = threadIdx.x % 32 >> 2, in_group = threadIdx.x % 32 % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
    for (int k = 0; k < 16; ++k) c[i] += left[row][k] * right[k][column];
  }
}

// Row r of matrix m starts where lane 8 m + r says. Of a row, lane 4 r + j gets elements 2 j and
// 2 j + 1, the low half first; with .trans, of a column.
inline void load_matrices(uint32_t at, uint32_t (&result)[4]) {
  const auto* words = emulated::share(at);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned m = 0; m < 4; ++m) {
    std::memcpy(&result[m], shared_row(words[8 * m + lane / 4][0]) + lane % 4 * 4, 4);
  }
}
inline void load_matrices_transposed(uint32_t at, uint32_t (&result)[4]) {
  const auto* words = emulated::share(at);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned m = 0; m < 4; ++m) {
    uint16_t two[2];
    for (unsigned i = 0; i < 2; ++i) {
      std::memcpy(&two[i], shared_row(words[8 * m + lane % 4 * 2 + i][0]) + lane / 4 * 2, 2);
    }
    result[m] = two[0] | static_cast<uint32_t>(two[1]) << 16;
  }
}

// Nothing arrives before the wait.
inline thread_local std::vector<std::pair<uint32_t, const void*>> copies_under_way;
inline void copy_async(uint32_t to, const void* from) { copies_under_way.push_back({to, from}); }
inline void wait_for_copies() {
  for (const auto& [to, from] : copies_under_way) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) std::abort();
    std::memcpy(const_cast<unsigned char*>(shared_row(to)), from, 16);
  }
  copies_under_way.clear();
}

inline float power_of_two(float exponent) { return std::exp2(exponent); }
inline float log_of_two(float power) { return std::log2(power); }
inline int32_t thread_number() { return static_cast<int32_t>(threadIdx.x); }
template <class Number>
Number here(Number number) {
  return number;
}

}  // namespace spcxr
