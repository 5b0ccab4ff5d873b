// Masked attention: what a call holds, and the entry points.
//
// For sequence b, head h and query i, over the keys j of b that are not masked:
//   s_ij = scale * sum_d (q_i + q_bias)_d (k_j + k_bias)_d
//   lse_i = log sum_j exp(s_ij),  p_ij = exp(s_ij - lse_i),  out_i = sum_j p_ij (v_j + v_bias)
// Without such keys out_i is 0 and lse_i is +infinity (so that p_ij is 0 in the backward pass too).
// Masked keys are never read: whatever they hold, NaN too, changes nothing, and dk, dv are 0 there.
// A masked token still asks: masks hide keys, not queries. The backward pass, with the same p:
//   dv_j = sum_i p_ij do_i,  ds_ij = p_ij (do_i . v_j - do_i . out_i),
//   dq_i = scale * sum_j ds_ij k_j,  dk_j = scale * sum_i ds_ij q_i
#pragma once

#include <cstdint>

#include "core/views.h"

namespace spcxr {

// One of q, k, v: element (b, i, h, d) is at [b * batch + i * token + h * head + d]. In a packed
// batch, token i of sequence b is at [(cu_seqlens[b] + i) * token + h * head + d].
struct Strides {
  int64_t batch, token, head;
};

struct Attention {
  TokenType type;  // of q, k, v, bias, out and their gradients
  const void *q, *k, *v;
  Strides q_strides, k_strides, v_strides;
  const void* bias;            // [3, heads, dim] or null
  const uint32_t* key_bits;    // [count, key_words(n_max)] or null; bit j % 32 of word j / 32: masked
  const int32_t* cu_seqlens;   // [count + 1], from 0 up, or null: every sequence has n_max tokens
  int64_t count;               // sequences
  int64_t total;               // rows of out: count * n_max, or those of the packed batch
  int32_t n_max, heads, dim;   // tokens of a sequence, at most
  float scale;

  // The first row of sequence b in out [total, heads * dim], and its number of tokens.
  SPCXR_HD int64_t first_row(int64_t b) const {
    return cu_seqlens == nullptr ? b * n_max : cu_seqlens[b];
  }
  SPCXR_HD int32_t length(int64_t b) const {
    return cu_seqlens == nullptr ? n_max : cu_seqlens[b + 1] - cu_seqlens[b];
  }
  // The element (b, 0, h, 0) of q, k, v or of a gradient that lies like it.
  SPCXR_HD int64_t first_element(const Strides& s, int64_t b, int32_t h) const {
    return (cu_seqlens == nullptr ? b * s.batch : cu_seqlens[b] * s.token) + h * s.head;
  }
  SPCXR_HD int32_t key_words() const { return (n_max + 31) / 32; }
  SPCXR_HD bool masked(int64_t b, int32_t j) const {
    return key_bits != nullptr && (key_bits[b * key_words() + j / 32] >> (j % 32) & 1u) != 0;
  }
};

// What the backward pass reads besides, and writes. All of dq, dk, dv is written, masked keys too.
struct AttentionGradient {
  const void* out;       // [total, heads * dim], what the forward pass gave
  const void* grad_out;  // [total, heads * dim]
  const float* lse;      // [heads, total]
  void *dq, *dk, *dv;
  Strides dq_strides, dk_strides, dv_strides;
};

// --- CPU: pairs [begin, end) of (sequence, head), pair = b * heads + h; one thread. Rows of a packed
// batch past cu_seqlens[count] are the caller's. lse [heads, total] is null when not wanted.

void masked_attention_cpu(const Attention& a, int64_t begin, int64_t end, void* out, float* lse);
void masked_attention_backward_cpu(const Attention& a, const AttentionGradient& g, int64_t begin,
                                   int64_t end);

// The instruction set that serves a call: amx, avx512_bf16, avx512, avx2 or portable.
const char* attention_isa(TokenType type, int32_t dim);

// --- CUDA: the whole batch; all pointers are on the device. Null, or why not. Rows of a packed batch
// past cu_seqlens[count] are written with zeros. cu_seqlens that fall, or go past `total` or n_max,
// trap.

// Whether the kernels take such a call: 16-bit types, dim 32, 64 or 128, n_max within their shared
// memory. Null, or why not.
const char* attention_refused_cuda(const Attention& a, bool backward);
const char* masked_attention_cuda(const Attention& a, void* out, float* lse, void* cuda_stream);
const char* masked_attention_backward_cuda(const Attention& a, const AttentionGradient& g,
                                           void* cuda_stream);

}  // namespace spcxr
