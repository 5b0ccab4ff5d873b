#include "cuda/attention_backward.cuh"

#include "cuda/attention_launch.cuh"

namespace spcxr {

const char* masked_attention_backward_cuda(const Attention& a, const AttentionGradient& g,
                                           void* cuda_stream) {
  if (const char* reason = attention_refused_cuda(a, true)) return reason;
  const Strides rows{0, int64_t{a.heads} * a.dim, a.dim};
  if (!in_pieces(g.out, rows) || !in_pieces(g.grad_out, rows) ||
      !in_pieces(g.dq, g.dq_strides) || !in_pieces(g.dk, g.dk_strides) ||
      !in_pieces(g.dv, g.dv_strides)) {
    return "out or a gradient is not at multiples of 16 bytes";
  }
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  if (a.count == 0 || a.heads == 0) {
    clear_rows(a, g.dq, g.dq_strides, stream);
    clear_rows(a, g.dk, g.dk_strides, stream);
    return clear_rows(a, g.dv, g.dv_strides, stream);
  }
  return with_token_and_dim(a, [&](auto token, auto dim) {
    using Token = decltype(token);
    return launch_heads(attention_backward_kernel<Token, decltype(dim)::value>, a,
                        backward_warps(a.n_max), backward_bytes(a.n_max, a.dim), stream, g);
  });
}

}  // namespace spcxr
