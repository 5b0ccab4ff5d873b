#include "cuda/attention_forward.cuh"

#include "cuda/attention_launch.cuh"

namespace spcxr {

const char* attention_refused_cuda(const Attention& a, bool backward) {
  if (a.type == TokenType::kFloat32) return "tokens are bfloat16 or float16 on CUDA";
  if (a.dim != 32 && a.dim != 64 && a.dim != 128) return "the head dim is 32, 64 or 128 on CUDA";
  if (backward && a.n_max > kBackwardTokens) return "a sequence has up to 256 tokens on CUDA";
  if (a.n_max > kForwardTokens) return "a sequence has up to 384 tokens on CUDA";
  if (a.n_max < 0 || a.count < 0 || a.total < 0 || a.heads < 0) return "a size is below 0";
  if (a.count * a.heads > INT32_MAX) return "a batch of 2**31 heads or more";
  if (!in_pieces(a.q, a.q_strides) || !in_pieces(a.k, a.k_strides) ||
      !in_pieces(a.v, a.v_strides) || reinterpret_cast<uintptr_t>(a.bias) % 16 != 0) {
    return "q, k, v or bias is not at multiples of 16 bytes";
  }
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int32_t bytes = backward ? backward_bytes(a.n_max, a.dim) : forward_bytes(a.n_max, a.dim);
  return bytes > most ? "a head does not fit into this device's shared memory" : nullptr;
}

const char* masked_attention_cuda(const Attention& a, void* out, float* lse, void* cuda_stream) {
  if (const char* reason = attention_refused_cuda(a, false)) return reason;
  const int64_t width = int64_t{a.heads} * a.dim;
  if (!in_pieces(out, Strides{0, width, a.dim})) return "out is not at multiples of 16 bytes";
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  if (a.count == 0 || a.heads == 0) {
    const size_t rows = static_cast<size_t>(a.total) * a.heads;
    if (lse != nullptr) cudaMemsetAsync(lse, 0, rows * sizeof(float), stream);
    return clear_rows(a, out, Strides{0, width, a.dim}, stream);
  }
  return with_token_and_dim(a, [&](auto token, auto dim) {
    using Token = decltype(token);
    return launch_heads(attention_forward_kernel<Token, decltype(dim)::value>, a,
                        forward_warps(a.n_max), forward_bytes(a.n_max, a.dim), stream,
                        static_cast<Token*>(out), lse);
  });
}

}  // namespace spcxr
