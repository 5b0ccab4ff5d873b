// One image's box, resampled into strips: a patch's values [C][P][P], one after the other. Rows are
// weighted first, along the source's columns; then columns, for kLanes rows of the view at a time,
// which lie side by side for that. Internal to kernels_body.h.
#pragma once

#include "cpu/lanes.h"
#include "cpu/parts.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

// What each output of an axis sees: `count` pixels from `first`, their weights' sum 1. Pixels at the
// ends with no weight are left out. Both ends move one way along the axis.
struct Taps {
  int32_t* first;
  int32_t* count;
  float* weights;
  int32_t most;  // weights of output i stand at i * most

  // Most pixels under a triangle of a box no larger than the source, rounding included.
  static int32_t most_of(int32_t source, int32_t out) {
    return smaller(2 * ((source + out) / out) + 4, source);
  }
  Taps(Parts& parts, int32_t source, int32_t out)
      : first(parts.take<int32_t>(out)),
        count(parts.take<int32_t>(out)),
        weights(parts.take<float>(int64_t{out} * most_of(source, out))),
        most(most_of(source, out)) {}

  int32_t end(int32_t i) const { return first[i] + count[i]; }

  void follow(const Axis& axis) {
    const float steepness = 1 / axis.reach;
    for (int32_t i = 0; i < axis.out; ++i) {
      const float centre = axis.centre(i);
      int32_t from = axis.first(centre);
      int32_t seen = smaller(axis.last(centre) - from, most);
      const auto weight = [&](int32_t k) {
        const float away = static_cast<float>(from + k) + 0.5f - centre;
        const float w = 1.0f - (away < 0 ? -away : away) * steepness;
        return w > 0 ? w : 0.0f;
      };
      while (seen > 1 && weight(0) == 0) {
        ++from;
        --seen;
      }
      while (seen > 1 && weight(seen - 1) == 0) --seen;
      float* const w = weights + int64_t{i} * most;
      float sum = 0;
      for (int32_t k = 0; k < seen; ++k) sum += w[k] = weight(k);
      const float share = 1 / sum;
      for (int32_t k = 0; k < seen; ++k) w[k] *= share;
      first[i] = from;
      count[i] = seen;
    }
  }
};

// out = sum over k < taps of weights[k] * rows[k * pitch], for n columns; more adds to what stands.
template <int taps, bool more, typename Pixel>
void weigh(const Pixel* __restrict rows, int64_t pitch, const float* weights, int32_t n,
           float* __restrict out) {
  float w[taps];
  for (int k = 0; k < taps; ++k) w[k] = weights[k];
  int32_t i = 0;
#ifdef __AVX2__
  for (; i + 8 <= n; i += 8) {
    __m256 sum = more ? load8(out + i) : _mm256_mul_ps(_mm256_set1_ps(w[0]), load8(rows + i));
    for (int k = more ? 0 : 1; k < taps; ++k) {
      const __m256 term = _mm256_mul_ps(_mm256_set1_ps(w[k]), load8(rows + k * pitch + i));
      sum = _mm256_add_ps(sum, term);
    }
    _mm256_storeu_ps(out + i, sum);
  }
#endif
  for (; i < n; ++i) {
    float sum = more ? out[i] : w[0] * static_cast<float>(rows[i]);
    for (int k = more ? 0 : 1; k < taps; ++k) sum += w[k] * static_cast<float>(rows[k * pitch + i]);
    out[i] = sum;
  }
}

template <typename Pixel>
void weigh_rows(const Pixel* rows, int64_t pitch, const float* weights, int32_t count, int32_t n,
                float* out) {
  if (count == 1) return weigh<1, false>(rows, pitch, weights, n, out);
  if (count == 2) return weigh<2, false>(rows, pitch, weights, n, out);
  if (count == 3) return weigh<3, false>(rows, pitch, weights, n, out);
  weigh<4, false>(rows, pitch, weights, n, out);
  int32_t k = 4;
  for (; k + 4 <= count; k += 4) weigh<4, true>(rows + k * pitch, pitch, weights + k, n, out);
  for (; k < count; ++k) weigh<1, true>(rows + k * pitch, pitch, weights + k, n, out);
}

class Resampler {
 public:
  Resampler(Parts& parts, const Views& views)
      : v_(views),
        lanes_(views.patch > 8 ? 16 : 8),
        pitch_((views.source_w + 15) / 16 * 16),
        across_(parts.take<float>(lanes_ * pitch_)),
        down_(parts.take<float>(lanes_ * pitch_)),
        columns_(parts.take<float>(int64_t{lanes_} * (views.patch + 4))) {}

  // Floats between the strips of two patches: `cut` writes up to 3 rows and 3 columns too many.
  static int64_t slot(const Views& v) { return v.row_length() + 3 * (v.patch + 1); }

  // Strips of the patches of a row of patches, where wanted.
  void operator()(int64_t b, const Taps& rows, const Taps& columns, int32_t patch_row,
                  const bool* wanted, float* strips) const {
    int32_t left = 0, right = v_.grid_w();
    while (left < right && !wanted[left]) ++left;
    while (left < right && !wanted[right - 1]) --right;
    if (left == right) return;
    const int32_t p = v_.patch, a = left * p, z = right * p - 1;
    const int32_t low = smaller(columns.first[a], columns.first[z]);
    const int32_t high = -smaller(-columns.end(a), -columns.end(z));
    for (int32_t c = 0; c < v_.channels; ++c)
      for (int32_t from = 0; from < p; from += lanes_) {
        const int32_t lanes = smaller(lanes_, p - from), row = patch_row * p + from;
        const int64_t start = b * v_.image_stride + c * v_.channel_stride + low;
        if (v_.pixel_type == PixelType::kUInt8) {
          weigh_band<uint8_t>(start, rows, row, lanes, high - low);
        } else if (v_.pixel_type == PixelType::kUInt16) {
          weigh_band<uint16_t>(start, rows, row, lanes, high - low);
        } else {
          weigh_band<float>(start, rows, row, lanes, high - low);
        }
        float* const strip = strips + (int64_t{c} * p + from) * p;
        for (int32_t n = left; n < right; ++n) {
          if (!wanted[n]) continue;
          lanes_ == 8 ? cut<8>(columns, n, low, lanes, strip + n * slot(v_))
                      : cut<16>(columns, n, low, lanes, strip + n * slot(v_));
        }
      }
  }

 private:
  // down_[column][lane]: n source columns of the view's rows from `row` on.
  template <typename Pixel>
  void weigh_band(int64_t start, const Taps& rows, int32_t row, int32_t lanes, int32_t n) const {
    const Pixel* const pixels = static_cast<const Pixel*>(v_.pixels) + start;
    for (int32_t r = 0; r < lanes; ++r) {
      const int32_t i = row + r;
      weigh_rows(pixels + rows.first[i] * v_.row_stride, v_.row_stride,
                 rows.weights + int64_t{i} * rows.most, rows.count[i], n, across_ + r * pitch_);
    }
    for (int32_t j = 0; j < n; j += 4)
      for (int32_t r = 0; r < lanes; r += 4) {
        transpose4(across_ + r * pitch_ + j, pitch_, down_ + int64_t{j} * lanes_ + r, lanes_);
      }
  }

  // One patch's columns out of down_. The rows and columns too many are overwritten by what comes
  // next in the strip: column blocks go from right to left for that.
  template <int kLanes>
  void cut(const Taps& taps, int32_t patch, int32_t low, int32_t lanes, float* strip) const {
    using Vector = typename VectorOf<(kVectorFloats < kLanes ? kVectorFloats : kLanes)>::Type;
    constexpr int kVectors = kLanes * sizeof(float) / sizeof(Vector);
    const int32_t p = v_.patch;
    for (int32_t j = 0; j < p; ++j) {
      const int32_t i = patch * p + j;
      const float* const weights = taps.weights + int64_t{i} * taps.most;
      const Vector* from =
          reinterpret_cast<const Vector*>(down_ + int64_t{taps.first[i] - low} * kLanes);
      Vector sum[kVectors];
      for (int q = 0; q < kVectors; ++q) sum[q] = weights[0] * from[q];
      const auto add = [&](int32_t k) {
        for (int q = 0; q < kVectors; ++q) sum[q] += weights[k] * from[k * kVectors + q];
      };
      if (taps.count[i] == 2) {  // without a loop where the image is hardly made smaller
        add(1);
      } else if (taps.count[i] == 3) {
        add(1);
        add(2);
      } else {
        for (int32_t k = 1; k < taps.count[i]; ++k) add(k);
      }
      Vector* const column = reinterpret_cast<Vector*>(columns_ + j * kLanes);
      for (int q = 0; q < kVectors; ++q) column[q] = sum[q];
    }
    for (int32_t r = 0; r < lanes; r += 4)
      for (int32_t j = (p - 1) / 4 * 4; j >= 0; j -= 4) {
        transpose4(columns_ + j * kLanes + r, kLanes, strip + r * p + j, p);
      }
  }

  const Views& v_;
  int32_t lanes_;
  int64_t pitch_;
  float* across_;   // [lanes][pitch]
  float* down_;     // [pitch][lanes]
  float* columns_;  // [patch, in fours][lanes]
};

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
