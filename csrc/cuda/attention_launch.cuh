// What the attention kernels take, and how they are launched.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/attention_tiles.cuh"
#include "cuda/launch.cuh"

namespace spcxr {

// For the type and head dim of a call that is not refused: call(token, dim).
template <class Call>
const char* with_token_and_dim(const Attention& a, const Call& call) {
  const auto with_dim = [&](auto token) {
    if (a.dim == 32) return call(token, std::integral_constant<int, 32>{});
    if (a.dim == 64) return call(token, std::integral_constant<int, 64>{});
    return call(token, std::integral_constant<int, 128>{});
  };
  return a.type == TokenType::kBFloat16 ? with_dim(BFloat16{}) : with_dim(Float16{});
}

// Whether rows of tokens can be read and written 16 bytes at a time.
inline bool in_pieces(const void* first, const Strides& strides) {
  return reinterpret_cast<uintptr_t>(first) % 16 == 0 && strides.batch % 8 == 0 &&
         strides.token % 8 == 0 && strides.head % 8 == 0;
}

// A block for each (sequence, head).
template <class... Parameters, class... Arguments>
const char* launch_heads(void (*kernel)(Attention, Parameters...), const Attention& a,
                         int32_t warps, int32_t bytes, cudaStream_t stream,
                         const Arguments&... arguments) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                       cudaSharedmemCarveoutMaxShared);
  const auto grid = static_cast<unsigned>(a.count * a.heads);
  kernel<<<grid, warps * 32, bytes, stream>>>(a, arguments...);
  return launch_error();
}

// All of a packed batch without sequences: rows [total, heads, dim].
inline const char* clear_rows(const Attention& a, void* rows, const Strides& strides,
                              cudaStream_t stream) {
  for (int32_t h = 0; h < a.heads && a.total > 0; ++h) {
    cudaMemset2DAsync(static_cast<uint16_t*>(rows) + h * strides.head, strides.token * 2, 0,
                      a.dim * 2, a.total, stream);
  }
  return launch_error();
}

}  // namespace spcxr
