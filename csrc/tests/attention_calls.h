// Random calls of masked attention and their truth in double precision, for the C++ tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "core/attention.h"

namespace spcxr {

// What a call looks like; everything else about it is drawn.
struct AttentionShape {
  int32_t n_max, heads, dim;
  int64_t count;
  bool packed, masks, bias, separate;
  float size;  // of the logits' inputs
};

// A call with float storage, in which masked keys hold NaN; `Token` arrays are made from it by the
// tests. Values are rounded to bfloat16, so that every type holds them exactly.
struct AttentionCall {
  AttentionShape shape;
  std::vector<int32_t> cu_seqlens;
  std::vector<uint32_t> key_bits;
  std::vector<float> q, k, v, bias, grad_out;  // q, k, v: [total, heads, dim] each
  int64_t total = 0;

  int64_t first_row(int64_t b) const { return shape.packed ? cu_seqlens[b] : b * shape.n_max; }
  int32_t length(int64_t b) const {
    return shape.packed ? cu_seqlens[b + 1] - cu_seqlens[b] : shape.n_max;
  }
  bool masked(int64_t b, int32_t j) const {
    const int32_t words = (shape.n_max + 31) / 32;
    return shape.masks && (key_bits[b * words + j / 32] >> (j % 32) & 1u) != 0;
  }
};

inline float as_bfloat16(float value) {
  return bits_to_float((float_to_bits(value) + 0x7FFFu + (float_to_bits(value) >> 16 & 1u)) &
                       0xFFFF0000u);
}

inline AttentionCall draw_attention(const AttentionShape& shape, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  AttentionCall call{shape, {0}, {}, {}, {}, {}, {}, {}, 0};
  for (int64_t b = 0; b < shape.count; ++b) {
    const int32_t length =
        shape.packed ? static_cast<int32_t>(random() % (shape.n_max + 1)) : shape.n_max;
    call.cu_seqlens.push_back(call.cu_seqlens.back() + length);
  }
  call.total = call.cu_seqlens.back();
  const int32_t words = (shape.n_max + 31) / 32;
  for (int64_t b = 0; b < shape.count && shape.masks; ++b) {
    const uint64_t kind = random() % 4;  // nothing, everything, or a share is masked
    for (int32_t w = 0; w < words; ++w) {
      const auto bits = static_cast<uint32_t>(random());
      call.key_bits.push_back(kind == 0 ? 0 : kind == 1 ? ~0u : bits);
    }
  }
  const int64_t width = int64_t{shape.heads} * shape.dim;
  const auto fill = [&](std::vector<float>& values, int64_t n, float size) {
    for (int64_t i = 0; i < n; ++i) values.push_back(as_bfloat16(size * normal(random)));
  };
  fill(call.q, call.total * width, shape.size);
  fill(call.k, call.total * width, shape.size);
  fill(call.v, call.total * width, 1);
  fill(call.grad_out, call.total * width, 1);
  if (shape.bias) fill(call.bias, 3 * width, 0.5f);
  for (int64_t b = 0; b < shape.count; ++b) {
    for (int32_t j = 0; j < call.length(b); ++j) {
      if (!call.masked(b, j)) continue;
      const int64_t at = (call.first_row(b) + j) * width;
      std::fill_n(call.k.begin() + at, width, std::numeric_limits<float>::quiet_NaN());
      std::fill_n(call.v.begin() + at, width, std::numeric_limits<float>::quiet_NaN());
    }
  }
  return call;
}

// [total, heads, dim] each, and lse [heads, total].
struct AttentionTruth {
  std::vector<double> out, dq, dk, dv, lse;
};

// The formulas of core/attention.h.
inline AttentionTruth attention_truth(const AttentionCall& call, double scale) {
  const auto& s = call.shape;
  const int64_t dim = s.dim, width = s.heads * dim;
  AttentionTruth truth;
  for (auto* values : {&truth.out, &truth.dq, &truth.dk, &truth.dv}) {
    values->assign(call.total * width, 0.0);
  }
  truth.lse.assign(s.heads * call.total, std::numeric_limits<double>::infinity());
  for (int64_t b = 0; b < s.count; ++b) {
    for (int32_t h = 0; h < s.heads; ++h) {
      const auto row = [&](int32_t i) { return (call.first_row(b) + i) * width + h * dim; };
      const auto biased = [&](const std::vector<float>& values, int which, int64_t at, int64_t d) {
        const float bias = s.bias ? call.bias[which * width + h * dim + d] : 0.0f;
        return double{values[at + d]} + bias;
      };
      std::vector<int32_t> keys;
      for (int32_t j = 0; j < call.length(b); ++j) {
        if (!call.masked(b, j)) keys.push_back(j);
      }
      for (int32_t i = 0; i < call.length(b) && !keys.empty(); ++i) {
        std::vector<double> p(keys.size());
        double most = -std::numeric_limits<double>::infinity(), sum = 0, delta = 0;
        for (size_t n = 0; n < keys.size(); ++n) {
          for (int64_t d = 0; d < dim; ++d) {
            p[n] += scale * biased(call.q, 0, row(i), d) * biased(call.k, 1, row(keys[n]), d);
          }
          most = std::max(most, p[n]);
        }
        for (double& value : p) sum += value = std::exp(value - most);
        truth.lse[h * call.total + call.first_row(b) + i] = most + std::log(sum);
        for (size_t n = 0; n < keys.size(); ++n) {
          p[n] /= sum;
          for (int64_t d = 0; d < dim; ++d) {
            truth.out[row(i) + d] += p[n] * biased(call.v, 2, row(keys[n]), d);
          }
        }
        for (int64_t d = 0; d < dim; ++d) {
          delta += truth.out[row(i) + d] * call.grad_out[row(i) + d];
        }
        for (size_t n = 0; n < keys.size(); ++n) {
          double dp = 0;
          for (int64_t d = 0; d < dim; ++d) {
            dp += call.grad_out[row(i) + d] * biased(call.v, 2, row(keys[n]), d);
          }
          const double ds = scale * p[n] * (dp - delta);
          for (int64_t d = 0; d < dim; ++d) {
            truth.dv[row(keys[n]) + d] += p[n] * call.grad_out[row(i) + d];
            truth.dq[row(i) + d] += ds * biased(call.k, 1, row(keys[n]), d);
            truth.dk[row(keys[n]) + d] += ds * biased(call.q, 0, row(i), d);
          }
        }
      }
    }
  }
  return truth;
}

}  // namespace spcxr
