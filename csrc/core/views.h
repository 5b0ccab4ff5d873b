// Views: a box of each image, resampled to one size, scaled and cut into patches; and what hides
// parts of them. The arithmetic of one pixel, host and device; the loops are the backends'.
// Compile with -ffp-contract=off (nvcc: -fmad=false), so that it is the same arithmetic everywhere.
#pragma once

#include <cstdint>

#include "core/geometry.h"
#include "core/normal.h"

namespace spcxr {

enum class PixelType : int32_t { kUInt8, kUInt16, kFloat32 };
enum class TokenType : int32_t { kFloat32, kBFloat16, kFloat16 };
enum FillKind : int32_t { kNoise, kZeros, kOther, kShuffle };  // FILLS of objectives/corruption.py

constexpr uint32_t kNoiseStream = 3;  // STREAMS["noise"]; the view's number stands 8 bits higher

// A batch of images [B, C, H, W] and how each becomes a view [C, out_h, out_w], whose patches are
// rows [C * patch * patch] in (channel, row, column) order. Pixels of a row are contiguous.
struct Views {
  const void* pixels;
  PixelType pixel_type;
  int64_t image_stride, channel_stride, row_stride;  // in pixels
  int64_t count;                                     // B
  int32_t channels, source_h, source_w, out_h, out_w, patch;
  const float* boxes;  // [B, 4] top, left, height, width in source pixels; null: the whole image
  const bool* flip;    // [B] left-right; null: none
  const float* scale;  // [B]; value = pixel * scale + shift
  const float* shift;  // [B]

  SPCXR_HD int32_t grid_h() const { return out_h / patch; }
  SPCXR_HD int32_t grid_w() const { return out_w / patch; }
  SPCXR_HD int32_t patches() const { return grid_h() * grid_w(); }
  SPCXR_HD int32_t row_length() const { return channels * patch * patch; }
};

// What hides parts of the views. `blocks` and `sources` are read for kShuffle alone.
struct Fill {
  const bool* mask;        // [B, out_h / unit, out_w / unit], true = hidden; null: nothing is hidden
  int32_t unit;            // pixels a side of a cell of the mask: 1 or the patch
  const int32_t* kind;     // [B] FillKind
  const int64_t* partner;  // [B] row of the image whose view fills, for kOther
  const int32_t* blocks;   // [B, n_blocks, 4] top, left, height, width in view pixels; height 0 pads
  const int32_t* sources;  // [B, n_blocks, 2] top, left of the rectangle that fills the block
  int32_t n_blocks;
  const int64_t* image_ids;  // [B], key of the noise
  int64_t seed, epoch;
  uint32_t view;
};

// A bool as its byte: a caller's mask may be other bytes seen as bools (a PNG's 255), and a compiler
// takes a bool for 0 or 1.
SPCXR_HD bool flag(const bool* flags, int64_t i) {
  return reinterpret_cast<const uint8_t*>(flags)[i] != 0;
}

// One axis of a box: output i looks at `centre(i)` in source pixels through a triangle whose half
// width is `reach`: antialiased bilinear, as Pillow's. Weights are clipped at the image's border
// and divided by their sum.
struct Axis {
  float start, step, reach;
  int32_t source, out;
  bool flip;

  SPCXR_HD float centre(int32_t i) const {
    const int32_t place = flip ? out - 1 - i : i;
    return start + (static_cast<float>(place) + 0.5f) * step;
  }
  SPCXR_HD float weight(float centre, int32_t pixel) const {
    const float away = static_cast<float>(pixel) + 0.5f - centre;
    const float w = 1.0f - (away < 0 ? -away : away) / reach;
    return w > 0 ? w : 0.0f;
  }
  // The first pixel that may have a weight, and one past the last; always inside the image.
  SPCXR_HD int32_t first(float centre) const {
    const float edge = centre - reach - 0.5f;
    const int32_t pixel = edge > 0 ? (edge < source ? static_cast<int32_t>(edge) : source) : 0;
    return smaller(pixel, source - 1);
  }
  SPCXR_HD int32_t last(float centre) const {
    const float edge = centre + reach + 0.5f;
    const int32_t pixel = edge > 1 ? (edge < source ? static_cast<int32_t>(edge) : source) : 1;
    return smaller(pixel, source);
  }
  // Output i is source pixel i, and nothing else.
  SPCXR_HD bool identity() const { return start == 0 && step == 1 && source == out && !flip; }
};

SPCXR_HD Axis make_axis(float start, float extent, int32_t source, int32_t out, bool flip) {
  const float step = extent / static_cast<float>(out);
  return Axis{start, step, step > 1 ? step : 1.0f, source, out, flip};
}

SPCXR_HD Axis row_axis(const Views& v, int64_t b) {
  return v.boxes == nullptr
             ? make_axis(0, static_cast<float>(v.source_h), v.source_h, v.out_h, false)
             : make_axis(v.boxes[b * 4], v.boxes[b * 4 + 2], v.source_h, v.out_h, false);
}

SPCXR_HD Axis column_axis(const Views& v, int64_t b) {
  const bool flip = v.flip != nullptr && flag(v.flip, b);
  return v.boxes == nullptr
             ? make_axis(0, static_cast<float>(v.source_w), v.source_w, v.out_w, flip)
             : make_axis(v.boxes[b * 4 + 1], v.boxes[b * 4 + 3], v.source_w, v.out_w, flip);
}

SPCXR_HD float read_pixel(const Views& v, int64_t b, int32_t channel, int32_t row, int32_t column) {
  const int64_t at = b * v.image_stride + channel * v.channel_stride + row * v.row_stride + column;
  if (v.pixel_type == PixelType::kUInt8) return static_cast<const uint8_t*>(v.pixels)[at];
  if (v.pixel_type == PixelType::kUInt16) return static_cast<const uint16_t*>(v.pixels)[at];
  return static_cast<const float*>(v.pixels)[at];
}

// The value of one pixel of image b's view: what every backend must equal, to rounding.
SPCXR_HD float view_value(const Views& v, int64_t b, const Axis& rows, const Axis& columns,
                          int32_t channel, int32_t row, int32_t column) {
  if (rows.identity() && columns.identity()) {
    return read_pixel(v, b, channel, row, column) * v.scale[b] + v.shift[b];
  }
  const float y = rows.centre(row), x = columns.centre(column);
  float sum = 0, weights_y = 0, weights_x = 0;
  for (int32_t j = columns.first(x); j < columns.last(x); ++j) weights_x += columns.weight(x, j);
  for (int32_t i = rows.first(y); i < rows.last(y); ++i) {
    const float weight = rows.weight(y, i);
    float across = 0;
    for (int32_t j = columns.first(x); j < columns.last(x); ++j) {
      across += columns.weight(x, j) * read_pixel(v, b, channel, i, j);
    }
    sum += weight * across;
    weights_y += weight;
  }
  return sum / (weights_y * weights_x) * v.scale[b] + v.shift[b];
}

SPCXR_HD bool is_hidden(const Views& v, const Fill& f, int64_t b, int32_t row, int32_t column) {
  if (f.mask == nullptr) return false;
  const int32_t h = v.out_h / f.unit, w = v.out_w / f.unit;
  return flag(f.mask, (b * h + row / f.unit) * w + column / f.unit);
}

struct Place {
  int32_t row, column;
};

// Where kShuffle reads a pixel: the last block over it counts; a pixel under none reads itself.
SPCXR_HD Place shuffled(const Fill& f, int64_t b, int32_t row, int32_t column) {
  for (int32_t k = f.n_blocks - 1; k >= 0; --k) {
    const int32_t* block = f.blocks + (b * f.n_blocks + k) * 4;
    const int32_t down = row - block[0], right = column - block[1];
    if (down < 0 || right < 0 || down >= block[2] || right >= block[3]) continue;
    const int32_t* source = f.sources + (b * f.n_blocks + k) * 2;
    return Place{source[0] + down, source[1] + right};
  }
  return Place{row, column};
}

// The noise of element e of patch n of image b is normal number n * row_length + e of its stream.
SPCXR_HD float noise_value(const Views& v, const Fill& f, int64_t b, int32_t patch, int32_t element) {
  const Stream stream =
      make_stream(f.seed, f.epoch, f.image_ids[b], kNoiseStream | f.view << 8);
  const uint32_t index = static_cast<uint32_t>(patch) * v.row_length() + element;
  const Words w = stream(index >> 2);
  const Pair pair = index & 2 ? normal_pair(w.w[2], w.w[3]) : normal_pair(w.w[0], w.w[1]);
  return index & 1 ? pair.second : pair.first;
}

// The loss of one hidden element, and what of its derivative by the prediction is kept for the
// backward pass: the error's sign, or the error. `slope_weight` of it is the derivative.
enum class Distance : int32_t { kL1, kMSE };

SPCXR_HD float loss_value(Distance d, float error) {
  return d == Distance::kL1 ? (error < 0 ? -error : error) : error * error;
}

SPCXR_HD float loss_slope(Distance d, float error) {
  return d == Distance::kMSE ? error : static_cast<float>((error > 0) - (error < 0));
}

SPCXR_HD double slope_weight(Distance d) { return d == Distance::kMSE ? 2 : 1; }

// Per-patch normalisation of the target (MAE): unbiased variance plus this.
constexpr float kPatchVarianceFloor = 1e-6f;

}  // namespace spcxr
