// Words in and out: wide loads of pixels, wide loads and stores of tokens.
#pragma once

#include <cstdint>

#include "core/normal.h"

namespace spcxr {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ inline bool aligned(const void* at, uint32_t bytes) {
  return (reinterpret_cast<uintptr_t>(at) & (bytes - 1)) == 0;
}

#ifdef __CUDACC__  // elsewhere csrc/tests/cuda_emulation.h has these four
__device__ inline uint32_t bfloat16x2(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ inline uint32_t float16x2(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ inline float from_float16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Only resampling may fuse: a test looks for the remark at every fused operation of the PTX.
__device__ inline float fused(float a, float b, float c) {
  float sum;
  asm("fma.rn.f32 %0, %1, %2, %3; // resampling" : "=f"(sum) : "f"(a), "f"(b), "f"(c));
  return sum;
}
#endif

__device__ inline uint32_t pack(BFloat16, float low, float high) { return bfloat16x2(low, high); }
__device__ inline uint32_t pack(Float16, float low, float high) { return float16x2(low, high); }
__device__ inline float unpack(Float16 token) { return from_float16(token.bits); }
__device__ inline float unpack(BFloat16 token) { return bits_to_float(uint32_t{token.bits} << 16); }
__device__ inline float unpack(float token) { return token; }
__device__ inline float unpack(int8_t sign) { return sign; }

template <class Token>
__device__ inline void store_one(Token* at, float value) {
  at->bits = static_cast<uint16_t>(pack(Token{}, value, 0.0f));
}
__device__ inline void store_one(float* at, float value) { *at = value; }
__device__ inline void store_one(int8_t* at, float value) { *at = static_cast<int8_t>(value); }

// Eight tokens at a multiple of 16 bytes.
template <class Token>
__device__ inline void store_eight(Token* at, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(at) =
      make_uint4(pack(Token{}, x[0], x[1]), pack(Token{}, x[2], x[3]), pack(Token{}, x[4], x[5]),
                 pack(Token{}, x[6], x[7]));
}
__device__ inline void store_eight(float* at, const float (&x)[8]) {
  reinterpret_cast<float4*>(at)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(at)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

// Small whole numbers, at a multiple of 8 bytes.
__device__ inline void store_eight(int8_t* at, const float (&x)[8]) {
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    words[i / 4] |= (static_cast<uint32_t>(static_cast<int32_t>(x[i])) & 0xFF) << i % 4 * 8;
  }
  *reinterpret_cast<uint2*>(at) = make_uint2(words[0], words[1]);
}

// Four tokens; one store where their place allows.
template <class Token>
__device__ inline void store_four(Token* at, const float (&x)[4]) {
  if (aligned(at, 8)) {
    *reinterpret_cast<uint2*>(at) =
        make_uint2(pack(Token{}, x[0], x[1]), pack(Token{}, x[2], x[3]));
  } else {
    for (int i = 0; i < 4; ++i) store_one(at + i, x[i]);
  }
}
__device__ inline void store_four(float* at, const float (&x)[4]) {
  if (aligned(at, 16)) {
    *reinterpret_cast<float4*>(at) = make_float4(x[0], x[1], x[2], x[3]);
  } else {
    for (int i = 0; i < 4; ++i) at[i] = x[i];
  }
}

// A whole number below 2**16 as a float, by its place in the mantissa: cheaper than a conversion.
__device__ inline float small(uint32_t number) {
  return bits_to_float(0x4B000000u | number) - 8388608.0f;
}

// Eight neighbours, where the first stands at a multiple of `load_alignment`.
template <class T>
constexpr uint32_t load_alignment = sizeof(T) == 1 ? 8 : 16;

struct Eight32 {
  float4 low, high;
};
template <class T>
struct Raw {
  using Type = uint4;
};
template <>
struct Raw<uint8_t> {
  using Type = uint2;
};
template <>
struct Raw<int8_t> {
  using Type = uint2;
};
template <>
struct Raw<float> {
  using Type = Eight32;
};

template <class T>
__device__ inline typename Raw<T>::Type load_raw(const T* at) {
  return __ldg(reinterpret_cast<const typename Raw<T>::Type*>(at));
}
__device__ inline Eight32 load_raw(const float* at) {
  return Eight32{__ldg(reinterpret_cast<const float4*>(at)),
                 __ldg(reinterpret_cast<const float4*>(at) + 1)};
}

__device__ inline void spread(uint2 w, float (&x)[8], uint8_t) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = small(w.x >> 8 * i & 0xFF);
    x[4 + i] = small(w.y >> 8 * i & 0xFF);
  }
}

__device__ inline void spread(uint2 w, float (&x)[8], int8_t) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = static_cast<int8_t>(w.x >> 8 * i);
    x[4 + i] = static_cast<int8_t>(w.y >> 8 * i);
  }
}

__device__ inline void split(uint32_t word, float& low, float& high, uint16_t) {
  low = small(word & 0xFFFF);
  high = small(word >> 16);
}
template <class Token>
__device__ inline void split(uint32_t word, float& low, float& high, Token) {
  low = unpack(Token{static_cast<uint16_t>(word)});
  high = unpack(Token{static_cast<uint16_t>(word >> 16)});
}

template <class T>  // uint16_t, BFloat16, Float16
__device__ inline void spread(uint4 w, float (&x)[8], T) {
  split(w.x, x[0], x[1], T{});
  split(w.y, x[2], x[3], T{});
  split(w.z, x[4], x[5], T{});
  split(w.w, x[6], x[7], T{});
}

__device__ inline void spread(const Eight32& w, float (&x)[8], float) {
  x[0] = w.low.x, x[1] = w.low.y, x[2] = w.low.z, x[3] = w.low.w;
  x[4] = w.high.x, x[5] = w.high.y, x[6] = w.high.z, x[7] = w.high.w;
}

template <class T>
__device__ inline void load_eight(const T* at, float (&x)[8]) {
  spread(load_raw(at), x, T{});
}

}  // namespace spcxr
