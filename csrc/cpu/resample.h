// One image's box, resampled into strips: a patch's values [C][P][P], one after the other. Rows are
// weighted first, along the source's columns; then columns: with AVX-512 out of two registers that
// hold all that 16 of them see of a row, otherwise for kLanes rows of the view at a time, which lie
// side by side for that. Both add in one order, so the bits are the same. Internal to kernels_body.h.
#pragma once

#include "cpu/lanes.h"
#include "cpu/parts.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

// What each output of an axis sees: `count` pixels from `first`, their weights' sum 1. Pixels at the
// ends with no weight are left out (one at an end: rounding may leave a second, of weight 0). Both
// ends move one way along the axis.
struct Taps {
  // The pixels of 16 outputs may be read at once so far, past the last output too.
  static constexpr int32_t kAtOnce = 5;

  int32_t* first;
  int32_t* count;
  float* weights;  // of output i's pixel k at i + k * outputs
  int64_t outputs;
  int32_t most;
  int32_t widest = 0;  // the largest count

  // Most pixels under a triangle of a box no larger than the source, rounding included.
  static int32_t most_of(int32_t source, int32_t out) {
    return smaller(2 * ((source + out) / out) + 4, source);
  }
  Taps(Parts& parts, int32_t source, int32_t out)
      : first(parts.take<int32_t>(out + 16)),
        count(parts.take<int32_t>(out + 16)),
        weights(parts.take<float>(out * int64_t{-smaller(-most_of(source, out), -kAtOnce)} + 16)),
        outputs(out),
        most(most_of(source, out)),
        centre_(parts.take<float>(out)),
        sum_(parts.take<float>(out)) {}

  int32_t end(int32_t i) const { return first[i] + count[i]; }

  // [low, high): the pixels that outputs a to z see.
  struct Window {
    int32_t low, high;
  };
  Window window(int32_t a, int32_t z) const {
    return {smaller(first[a], first[z]), -smaller(-end(a), -end(z))};
  }

  // Loops over all outputs, for the compiler to take many at once.
  void follow(const Axis& axis) {
    const float steepness = 1 / axis.reach;
    const auto weight = [&](int32_t i, int32_t pixel) {
      const float away = static_cast<float>(pixel) + 0.5f - centre_[i];
      const float w = 1.0f - (away < 0 ? -away : away) * steepness;
      return w > 0 ? w : 0.0f;
    };
    widest = 0;
    for (int32_t i = 0; i < axis.out; ++i) {
      centre_[i] = axis.centre(i);
      int32_t from = axis.first(centre_[i]);
      int32_t seen = smaller(axis.last(centre_[i]) - from, most);
      const int32_t before = seen > 1 && weight(i, from) == 0;
      from += before;
      seen -= before;
      seen -= seen > 1 && weight(i, from + seen - 1) == 0;
      first[i] = from;
      count[i] = seen;
      widest = seen > widest ? seen : widest;
      sum_[i] = 0;
    }
    for (int32_t k = 0; k < widest; ++k) {
      float* const w = weights + k * outputs;
      for (int32_t i = 0; i < axis.out; ++i) {
        w[i] = k < count[i] ? weight(i, first[i] + k) : 0.0f;
        sum_[i] += w[i];
      }
    }
    for (int32_t i = 0; i < axis.out; ++i) sum_[i] = 1 / sum_[i];
    for (int32_t k = 0; k < widest; ++k) {
      for (int32_t i = 0; i < axis.out; ++i) weights[i + k * outputs] *= sum_[i];
    }
  }

 private:
  float* centre_;  // of each output, and the sum of its weights
  float* sum_;
};

// out = sum over k < taps of weights[k * next] * rows[k * pitch], for n columns; more adds to what
// stands.
template <int taps, bool more, typename Pixel>
void weigh(const Pixel* __restrict rows, int64_t pitch, const float* weights, int64_t next,
           int32_t n, float* __restrict out) {
  int32_t i = 0;
#ifdef __AVX2__
  Sixteen w[taps];
  for (int k = 0; k < taps; ++k) w[k] = all16(weights[k * next]);
  const auto sixteen = [&](int32_t at) {
    Sixteen sum = more ? load16(out + at) : times(w[0], load16(rows + at));
    for (int k = more ? 0 : 1; k < taps; ++k) {
      sum = plus(sum, times(w[k], load16(rows + k * pitch + at)));
    }
    save16(out + at, sum);
  };
  for (; i + 16 <= n; i += 16) sixteen(i);
  if (!more && i > 0 && i < n) {  // the last ones, some of them twice
    sixteen(n - 16);
    return;
  }
#endif
  for (; i < n; ++i) {
    float sum = more ? out[i] : weights[0] * static_cast<float>(rows[i]);
    for (int k = more ? 0 : 1; k < taps; ++k) {
      sum += weights[k * next] * static_cast<float>(rows[k * pitch + i]);
    }
    out[i] = sum;
  }
}

template <typename Pixel>
void weigh_rows(const Pixel* rows, int64_t pitch, const float* weights, int64_t next,
                int32_t count, int32_t n, float* out) {
  if (count == 1) return weigh<1, false>(rows, pitch, weights, next, n, out);
  if (count == 2) return weigh<2, false>(rows, pitch, weights, next, n, out);
  if (count == 3) return weigh<3, false>(rows, pitch, weights, next, n, out);
  weigh<4, false>(rows, pitch, weights, next, n, out);
  int32_t k = 4;
  for (; k + 4 <= count; k += 4) {
    weigh<4, true>(rows + k * pitch, pitch, weights + k * next, next, n, out);
  }
  for (; k < count; ++k) {
    weigh<1, true>(rows + k * pitch, pitch, weights + k * next, next, n, out);
  }
}

class Resampler {
 public:
  Resampler(Parts& parts, const Views& views)
      : v_(views),
        lanes_(views.patch > 8 ? 16 : 8),
        pitch_((views.source_w + 15) / 16 * 16 + kWindow),
        across_(parts.take<float>(lanes_ * pitch_)),
        down_(parts.take<float>(lanes_ * pitch_)),
        columns_(parts.take<float>(int64_t{lanes_} * (views.patch + 4))) {}

  // Floats between the strips of two patches: `cut` writes up to 3 rows and 3 columns too many,
  // `pick` 15 columns.
  static int64_t slot(const Views& v) { return v.row_length() + 3 * (v.patch + 1) + 15; }

  // Strips of the patches of a row of patches, where wanted.
  void operator()(int64_t b, const Taps& rows, const Taps& columns, int32_t patch_row,
                  const bool* wanted, float* strips) const {
    int32_t left = 0, right = v_.grid_w();
    while (left < right && !wanted[left]) ++left;
    while (left < right && !wanted[right - 1]) --right;
    if (left == right) return;
    const int32_t p = v_.patch;
    const auto [low, high] = columns.window(left * p, right * p - 1);
    const bool picked = fits(columns, left, right);
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
        if (!picked) turn(lanes, high - low);
        float* const strip = strips + (int64_t{c} * p + from) * p;
        for (int32_t n = left; n < right; ++n) {
          if (!wanted[n]) continue;
          float* const to = strip + n * slot(v_);
          if (picked) {
            pick(columns, n, low, lanes, to);
          } else {
            lanes_ == 8 ? cut<8>(columns, n, low, lanes, to) : cut<16>(columns, n, low, lanes, to);
          }
        }
      }
  }

 private:
  // across_[lane][column]: n source columns of the view's rows from `row` on.
  template <typename Pixel>
  void weigh_band(int64_t start, const Taps& rows, int32_t row, int32_t lanes, int32_t n) const {
    const Pixel* const pixels = static_cast<const Pixel*>(v_.pixels) + start;
    for (int32_t r = 0; r < lanes; ++r) {
      const int32_t i = row + r;
      weigh_rows(pixels + rows.first[i] * v_.row_stride, v_.row_stride,
                 rows.weights + i, rows.outputs, rows.count[i], n, across_ + r * pitch_);
    }
  }

  // down_[column][lane]: the same, turned.
  void turn(int32_t lanes, int32_t n) const {
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
      const float* const weights = taps.weights + i;
      const Vector* from =
          reinterpret_cast<const Vector*>(down_ + int64_t{taps.first[i] - low} * kLanes);
      Vector sum[kVectors];
      for (int q = 0; q < kVectors; ++q) sum[q] = weights[0] * from[q];
      const auto add = [&](int32_t k) {
        const float weight = weights[k * taps.outputs];
        for (int q = 0; q < kVectors; ++q) sum[q] += weight * from[k * kVectors + q];
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

#ifdef __AVX512F__
  // What up to 16 columns of a patch see of a row lies in two registers, unless it is made much
  // smaller.
  static constexpr int32_t kWindow = 32;

  bool fits(const Taps& columns, int32_t left, int32_t right) const {
    if (columns.widest > Taps::kAtOnce) return false;
    for (int32_t n = left; n < right; ++n)
      for (int32_t j = 0; j < v_.patch; j += 16) {
        const int32_t a = n * v_.patch + j, z = a + smaller(16, v_.patch - j) - 1;
        const auto [low, high] = columns.window(a, z);
        if (high - low > kWindow) return false;
      }
    return true;
  }

  // One patch's columns out of across_; from right to left, as in `cut`.
  void pick(const Taps& taps, int32_t patch, int32_t low, int32_t lanes, float* strip) const {
    for (int32_t j = (v_.patch - 1) / 16 * 16; j >= 0; j -= 16) {
      const int32_t i = patch * v_.patch + j, z = i + smaller(16, v_.patch - j) - 1;
      const int32_t base = taps.window(i, z).low;
      const float* const from = across_ + (base - low);
      if (taps.widest <= 2) {
        pick16<2>(taps, i, base, from, lanes, strip + j);
      } else if (taps.widest == 3) {
        pick16<3>(taps, i, base, from, lanes, strip + j);
      } else {
        pick16<Taps::kAtOnce>(taps, i, base, from, lanes, strip + j);
      }
    }
  }

  // Columns [i, i + 16); those beyond the patch hold anything.
  template <int kTaps>
  void pick16(const Taps& taps, int32_t i, int32_t base, const float* from, int32_t lanes,
              float* to) const {
    const __m512i count = _mm512_loadu_si512(taps.count + i);
    const __m512i first =
        _mm512_sub_epi32(_mm512_loadu_si512(taps.first + i), _mm512_set1_epi32(base));
    __m512i place[kTaps];
    __m512 weight[kTaps];
    __mmask16 seen[kTaps];
    for (int k = 0; k < kTaps; ++k) {
      seen[k] = _mm512_cmpgt_epi32_mask(count, _mm512_set1_epi32(k));
      place[k] = _mm512_add_epi32(first, _mm512_set1_epi32(k));
      weight[k] = _mm512_loadu_ps(taps.weights + i + k * taps.outputs);
    }
    for (int32_t r = 0; r < lanes; ++r, from += pitch_, to += v_.patch) {
      const __m512 left = _mm512_loadu_ps(from), right = _mm512_loadu_ps(from + 16);
      __m512 sum = _mm512_mul_ps(weight[0], _mm512_permutex2var_ps(left, place[0], right));
      for (int k = 1; k < kTaps; ++k) {
        const __m512 seen_there = _mm512_permutex2var_ps(left, place[k], right);
        sum = _mm512_mask_add_ps(sum, seen[k], sum, _mm512_mul_ps(weight[k], seen_there));
      }
      _mm512_storeu_ps(to, sum);
    }
  }
#else
  static constexpr int32_t kWindow = 0;
  static bool fits(const Taps&, int32_t, int32_t) { return false; }
  static void pick(const Taps&, int32_t, int32_t, int32_t, float*) {}
#endif

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
