// Launching by the types that a call names.
#pragma once

#include <cuda_runtime.h>

#include "core/patch_gather.h"
#include "cuda/tokens.cuh"

namespace spcxr {

template <class Call>
void with_token(TokenType type, const Call& call) {
  switch (type) {
    case TokenType::kFloat32: return call(float{});
    case TokenType::kBFloat16: return call(BFloat16{});
    case TokenType::kFloat16: return call(Float16{});
  }
}

template <class Call>
void with_pixel(PixelType type, const Call& call) {
  switch (type) {
    case PixelType::kUInt8: return call(uint8_t{});
    case PixelType::kUInt16: return call(uint16_t{});
    case PixelType::kFloat32: return call(float{});
  }
}

inline bool aligned_16(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

// Where a thread may make eight tokens at once.
inline bool wide(const Views& v, const void* tokens) {
  return v.patch % 8 == 0 && aligned_16(tokens);
}

inline int32_t ceil_div(int64_t n, int64_t by) { return static_cast<int32_t>((n + by - 1) / by); }

inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace spcxr
