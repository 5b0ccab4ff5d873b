// The loss on hidden pixels, forward and backward, the target resampled from the raw image.
#pragma once

#include "cpu/patches.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

// Sums in eight lanes, for vectors of any width to give the same bits.
struct Lanes {
  static constexpr int kLanes = 8;
  double lane[kLanes] = {};

  template <typename Term>
  void add(int32_t n, const Term& term) {
    int32_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int k = 0; k < kLanes; ++k) lane[k] += term(i + k);
    for (int k = 0; i < n; ++i, ++k) lane[k] += term(i);
  }
  double sum() const {
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  }
};

inline void normalise(float* target, int32_t n) {
  Lanes first, second;
  first.add(n, [&](int32_t i) { return static_cast<double>(target[i]); });
  const double mean = first.sum() / n;
  second.add(n, [&](int32_t i) { return (target[i] - mean) * (target[i] - mean); });
  const double variance = second.sum() / (n > 1 ? n - 1 : 1);
  const double inverse = 1 / __builtin_sqrt(variance + static_cast<double>(kPatchVarianceFloor));
  for (int32_t i = 0; i < n; ++i) target[i] = static_cast<float>((target[i] - mean) * inverse);
}

// What a distance keeps of an element for the backward pass, as a token type.
template <Distance distance>
using Kept = std::conditional_t<distance == Distance::kL1, Sign, Float32>;

int64_t kept_size(Distance distance) { return distance == Distance::kL1 ? 1 : 4; }

// The loss of every element, 0 where not hidden, takes the target's place; its slope is written.
template <Distance distance, typename Token>
void compare(const typename Token::Bits* __restrict predicted, const uint8_t* __restrict hidden,
             int32_t n, float* __restrict target,
             typename Kept<distance>::Bits* __restrict slopes) {
  for (int32_t i = 0; i < n; ++i) {
    const float error = Token::to(predicted[i]) - target[i];
    const float loss = loss_value(distance, error), slope = loss_slope(distance, error);
    target[i] = hidden[i] ? loss : 0.0f;
    if (slopes != nullptr) slopes[i] = Kept<distance>::from(hidden[i] ? slope : 0.0f);
  }
}

template <typename Token>
void compare(Distance distance, const void* predicted, const uint8_t* hidden, int32_t n,
             float* target, void* slopes) {
  const auto* const p = static_cast<const typename Token::Bits*>(predicted);
  if (distance == Distance::kL1) {
    compare<Distance::kL1, Token>(p, hidden, n, target, static_cast<int8_t*>(slopes));
  } else {
    compare<Distance::kMSE, Token>(p, hidden, n, target, static_cast<float*>(slopes));
  }
}

class Loss {
 public:
  Loss(Parts& parts, const Views& views, const bool* mask, int32_t unit, const LossLaw& law)
      : v_(views),
        law_(law),
        bench_(parts, views),
        own_(parts, views, bench_),
        cover_(parts, views, mask, unit),
        target_(parts.take<float>(views.row_length())),
        states_(parts.take<Cover::State>(views.grid_w())),
        wanted_(parts.take<bool>(views.grid_w())) {}

  struct Sum {
    double distance;
    int64_t hidden;
  };

  // predicted and slopes are the image's.
  Sum operator()(int64_t b, const uint8_t* predicted, uint8_t* slopes, TokenType type) {
    Lanes total;
    int64_t hidden = 0;
    const int64_t size = v_.row_length() * int64_t(token_size(type));
    const int64_t kept = v_.row_length() * kept_size(law_.distance);
    own_.open(b);
    for (int32_t row = 0, n = 0; row < v_.grid_h(); ++row) {
      cover_.expect(b, n + v_.grid_w());
      for (int32_t j = 0; j < v_.grid_w(); ++j) {
        states_[j] = cover_.state(b, n + j);
        wanted_[j] = states_[j] != Cover::kNone;
      }
      own_.row(row, wanted_);
      for (int32_t j = 0; j < v_.grid_w(); ++j, ++n) {
        uint8_t* const here = slopes == nullptr ? nullptr : slopes + n * kept;
        if (wanted_[j]) {
          if (j + 1 < v_.grid_w() && wanted_[j + 1]) prefetch(predicted + (n + 1) * size, size);
          hidden += one_patch(b, n, j, predicted + n * size, here, type);
          total.add(v_.row_length(), [&](int32_t i) { return static_cast<double>(target_[i]); });
        } else if (here != nullptr) {
          std::memset(here, 0, size_t(kept));
        }
      }
    }
    return {total.sum(), hidden};
  }

 private:
  // How many of its elements are hidden.
  int32_t one_patch(int64_t b, int32_t n, int32_t column, const uint8_t* predicted,
                    uint8_t* slopes, TokenType type) {
    own_.write(column, {TokenType::kFloat32}, target_);
    if (law_.normalise_patches) normalise(target_, v_.row_length());
    const uint8_t* const hidden = cover_.elements(b, n, 0);
    with_type(type, nullptr, [&](auto token, auto*) {
      compare<decltype(token)>(law_.distance, predicted, hidden, v_.row_length(), target_, slopes);
    });
    if (states_[column] == Cover::kAll) return v_.row_length();
    int32_t count = 0;
    for (int32_t i = 0; i < v_.row_length(); ++i) count += hidden[i] != 0;
    return count;
  }

  const Views& v_;
  const LossLaw& law_;
  Bench bench_;
  Patches own_;
  Cover cover_;
  float* target_;  // one patch
  Cover::State* states_;
  bool* wanted_;
};

void masked_reconstruction_loss(const Views& v, const bool* mask, int32_t unit,
                                const void* predicted, TokenType type, const LossLaw& law,
                                int64_t begin, int64_t end, double* sums, int64_t* counts,
                                void* slope) {
  Parts counted(nullptr);
  Loss(counted, v, mask, unit, law);
  Parts parts(thread_scratch(counted.used()));
  Loss loss(parts, v, mask, unit, law);
  const int64_t elements = int64_t{v.patches()} * v.row_length();
  const int64_t image = elements * int64_t(token_size(type));
  const int64_t kept = elements * kept_size(law.distance);
  for (int64_t b = begin; b < end; ++b) {
    uint8_t* const slopes = static_cast<uint8_t*>(slope);
    const Loss::Sum sum = loss(b, static_cast<const uint8_t*>(predicted) + b * image,
                               slopes == nullptr ? nullptr : slopes + b * kept, type);
    sums[b] = sum.distance;
    counts[b] = sum.hidden;
  }
}

void reconstruction_gradient(const void* slope, bool signs, float factor, int64_t count,
                             int64_t begin, int64_t end, void* gradient, TokenType type) {
  if (factor != factor) factor = __builtin_nanf("");  // a NaN that `convert` of whole numbers bears
  const int64_t size = int64_t(token_size(type));
  uint8_t* const first = static_cast<uint8_t*>(gradient) + begin * size;
  const Sink sink{type, worth_streaming(first, 64, count * size)};
  const auto scale = [&](const auto* from) {
    convert_to(sink, from + begin, end - begin, factor, -0.0f, first);
  };
  signs ? scale(static_cast<const int8_t*>(slope)) : scale(static_cast<const float*>(slope));
  if (sink.streamed) end_streaming();
}

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
