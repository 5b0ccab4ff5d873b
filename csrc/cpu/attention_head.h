// What the forward and the backward pass of attention_body.h share: the keys of one head that are
// not masked, and products with them.
#pragma once

#include "cpu/attention_rows.h"
#include "cpu/parts.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

constexpr int32_t kMostQueries = 64;    // of a block
constexpr int32_t kNearScores = 16384;  // floats that stay in a near cache, for the forward pass
constexpr int32_t kFarScores = 65536;   // those of the backward pass, which does more with each
constexpr int32_t kMostSummed = 32;     // products in one go: long sums of like numbers drift

// A row of n numbers, so far from the next that a column of them fits a cache.
inline int32_t pitch_of(int32_t n) { return round_up(n, 16) | 16; }

// As many queries as keep a block of scores in its cache, but enough for the products.
inline int32_t most_queries(int32_t keys, int32_t scores) {
  const int32_t near = scores / pitch_of(keys) / kTileRows * kTileRows;
  return near < 2 * kTileRows ? 2 * kTileRows : smaller(near, kMostQueries);
}
// Their scores, for any number of keys up to n.
inline int64_t most_scores(int32_t n, int32_t scores) {
  const int64_t fewest = int64_t{2 * kTileRows} * pitch_of(n);
  return fewest > scores ? fewest : scores;
}

// One head of one sequence at a time.
template <typename Token>
class Head {
 public:
  using Bits = typename Token::Bits;

  Head(Parts& parts, const Attention& a)
      : a_(a),
        width_(round_up(a.dim, kVectorFloats)),
        panels_((width_ + kPanel - 1) / kPanel),
        visible_(parts.take<int32_t>(a.n_max)),
        bias_(parts.take<float>(3 * width_)),
        stage_(parts.take<float>(kPanel * width_)) {}

  // Lists the keys of pair b * heads + h.
  void open(int64_t pair) {
    b_ = pair / a_.heads;
    h_ = static_cast<int32_t>(pair % a_.heads);
    length_ = a_.length(b_);
    keys_ = 0;
    for (int32_t j = 0; j < length_; ++j) {
      visible_[keys_] = j;
      keys_ += !a_.masked(b_, j);
    }
    for (int32_t which = 0; which < 3; ++which) open_bias(which);
  }

 protected:
  // The biases of q, k, v: rows 0, 1, 2.
  void open_bias(int32_t which) {
    float* const to = bias_ + which * width_;
    std::memset(to, 0, size_t(width_) * sizeof(float));
    if (a_.bias == nullptr) return;
    const Bits* const from = static_cast<const Bits*>(a_.bias) +
                             (int64_t{which} * a_.heads + h_) * a_.dim;
    for (int32_t d = 0; d < a_.dim; ++d) to[d] = Token::to(from[d]);
  }

  // Queries take the scale's sign, 0 too, and scores its size.
  Entry entry(int32_t which) const {
    const float sign = static_cast<float>((a_.scale > 0) - (a_.scale < 0));
    return Entry{bias_ + which * width_, which == 0 ? sign : 1.0f};
  }
  float size() const { return a_.scale == 0 ? 1 : a_.scale < 0 ? -a_.scale : a_.scale; }
  const Bits* first(const void* values, const Strides& s) const {
    return static_cast<const Bits*>(values) + a_.first_element(s, b_, h_);
  }
  // Element (row i, head h) of something that lies like out.
  int64_t out_element(int32_t i) const {
    return ((a_.first_row(b_) + i) * a_.heads + h_) * a_.dim;
  }
  int64_t lse_element(int32_t i) const { return h_ * a_.total + a_.first_row(b_) + i; }

  // Calls `work` with each panel's first key and its rows [kPanel, width_].
  template <typename Work>
  void by_panels(const void* values, const Strides& s, int32_t which, const Work& work) {
    const Bits* const from = first(values, s);
    const Entry in = entry(which);
    for (int32_t j = 0; j < keys_; j += kPanel) {
      for (int32_t i = 0; i < kPanel; ++i) {
        float* const row = stage_ + i * width_;
        if (j + i < keys_) {
          read_row<Token>(from + visible_[j + i] * s.token, in, a_.dim, row);
        } else {
          std::memset(row, 0, size_t(width_) * sizeof(float));
        }
      }
      work(j, stage_);
    }
  }
  // Rows `stage` of keys from j on, into panels that have room for n_max keys.
  void put_keys(const float* stage, int32_t j, float* panels) const {
    for (int32_t i = 0; i < smaller(kPanel, keys_ - j); ++i) {
      put_in_panels(stage + i * width_, width_, key_panel(), panels + (j + i) * kPanel);
    }
  }
  int64_t key_panel() const { return int64_t{a_.n_max} * kPanel; }
  int64_t across_size() const { return int64_t{round_up(a_.n_max, kPanel)} * width_; }

  // scores [count, keys_] = rows [count, width_] times keys across, in panels [width_][kPanel].
  void multiply_keys(const float* rows, int32_t count, const float* keys, float* scores) const {
    multiply({rows, width_, keys, int64_t{kPanel} * width_, scores, pitch_of(keys_), count,
              end() / kVectorFloats, a_.dim, false});
  }
  // outs [count, width_] = scores times rows of keys in panels.
  void multiply_scores(const float* scores, int32_t count, const float* panels, float* outs) const {
    for (int32_t j = 0; j < keys_; j += kMostSummed) {
      multiply({scores + j, pitch_of(keys_), panels + int64_t{j} * kPanel, key_panel(), outs,
                width_, count, width_ / kVectorFloats, smaller(keys_ - j, kMostSummed), j > 0});
    }
  }
  // Where the whole vectors of a row of scores end. What stands past keys_ must weigh nothing.
  int32_t end() const { return round_up(keys_, kVectorFloats); }
  void shut(float* row) const {
    for (int32_t j = keys_; j < end(); ++j) row[j] = -__builtin_inff();
  }

  void write_row(const float* row, float scale, Bits* to) const {
    convert<Token>(row, a_.dim, scale, -0.0f, to);
  }
  void write_zeros(Bits* to) const { std::memset(to, 0, size_t(a_.dim) * sizeof(Bits)); }

  const Attention& a_;
  int32_t width_, panels_;  // of a row: dim and zeros
  int32_t* visible_;
  float* bias_;
  float* stage_;
  int64_t b_ = 0;
  int32_t h_ = 0, length_ = 0, keys_ = 0;
};

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
