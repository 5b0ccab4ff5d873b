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

// The loss of every element, 0 where not hidden, takes the target's place; its slope is written.
template <typename Token, Distance distance>
void compare(const typename Token::Bits* __restrict predicted, const uint8_t* __restrict hidden,
             int32_t n, float weight, float* __restrict target,
             typename Token::Bits* __restrict gradient) {
  for (int32_t i = 0; i < n; ++i) {
    const float error = Token::to(predicted[i]) - target[i];
    const float loss = loss_value(distance, error);
    const float slope = weight * loss_slope(distance, error);
    target[i] = hidden[i] ? loss : 0.0f;
    if (gradient != nullptr) gradient[i] = Token::from(hidden[i] ? slope : 0.0f);
  }
}

template <typename Token>
void compare(Distance distance, const void* predicted, const uint8_t* hidden, int32_t n,
             float weight, float* target, void* gradient) {
  using Bits = typename Token::Bits;
  const Bits* const p = static_cast<const Bits*>(predicted);
  Bits* const g = static_cast<Bits*>(gradient);
  if (distance == Distance::kL1) {
    compare<Token, Distance::kL1>(p, hidden, n, weight, target, g);
  } else {
    compare<Token, Distance::kMSE>(p, hidden, n, weight, target, g);
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

  // predicted and gradient are the image's.
  double operator()(int64_t b, const uint8_t* predicted, uint8_t* gradient, TokenType type) {
    Lanes total;
    const int64_t size = v_.row_length() * int64_t(token_size(type));
    own_.open(b);
    for (int32_t row = 0, n = 0; row < v_.grid_h(); ++row) {
      for (int32_t j = 0; j < v_.grid_w(); ++j) {
        states_[j] = cover_.state(b, n + j);
        wanted_[j] = states_[j] != Cover::kNone;
      }
      own_.row(row, wanted_);
      for (int32_t j = 0; j < v_.grid_w(); ++j, ++n) {
        uint8_t* const slopes = gradient == nullptr ? nullptr : gradient + n * size;
        if (wanted_[j]) {
          one_patch(b, n, j, predicted + n * size, slopes, type);
          total.add(v_.row_length(), [&](int32_t i) { return static_cast<double>(target_[i]); });
        } else if (slopes != nullptr) {
          std::memset(slopes, 0, size_t(size));
        }
      }
    }
    return total.sum() * static_cast<double>(law_.weight);
  }

 private:
  void one_patch(int64_t b, int32_t n, int32_t column, const uint8_t* predicted, uint8_t* slopes,
                 TokenType type) {
    own_.write(column, {TokenType::kFloat32}, target_);
    if (law_.normalise_patches) normalise(target_, v_.row_length());
    const uint8_t* const hidden = cover_.elements(b, n, 0);
    const auto follow = [&](auto token) {
      compare<decltype(token)>(law_.distance, predicted, hidden, v_.row_length(), law_.weight,
                               target_, slopes);
    };
    if (type == TokenType::kFloat32) return follow(Float32{});
    if (type == TokenType::kBFloat16) return follow(BFloat16{});
    follow(Float16{});
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
                                int64_t begin, int64_t end, double* sums, void* gradient) {
  Parts counted(nullptr);
  Loss(counted, v, mask, unit, law);
  Parts parts(thread_scratch(counted.used()));
  Loss loss(parts, v, mask, unit, law);
  const int64_t image = int64_t{v.patches()} * v.row_length() * int64_t(token_size(type));
  for (int64_t b = begin; b < end; ++b) {
    uint8_t* const slopes = static_cast<uint8_t*>(gradient);
    sums[b] = loss(b, static_cast<const uint8_t*>(predicted) + b * image,
                   slopes == nullptr ? nullptr : slopes + b * image, type);
  }
}

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
