// What one thread sees of a view: eight neighbours of a row, or one pixel.
#pragma once

#include "core/views.h"
#include "cuda/tokens.cuh"

namespace spcxr {

// An image's box, read once a thread.
template <class Pixel>
struct Sight {
  Axis rows, columns;
  float scale, shift;
  const Pixel* image;
  bool native;

  __device__ Sight(const Views& v, int64_t b)
      : rows(row_axis(v, b)),
        columns(column_axis(v, b)),
        scale(v.scale[b]),
        shift(v.shift[b]),
        image(static_cast<const Pixel*>(v.pixels) + b * v.image_stride),
        native(rows.identity() && columns.identity()) {}
};

// One axis of one output: its first tap with a weight, one past its last candidate, and weights.
struct Taps {
  int32_t first, end;
  float centre, slope;

  __device__ Taps(const Axis& axis, int32_t i) : slope(1.0f / axis.reach) {
    const float c = axis.centre(i);
    end = axis.last(c);
    // The pixel at or before the triangle's edge has no weight.
    first = smaller(axis.first(c) + (c - axis.reach - 0.5f >= 0), end - 1);
    centre = c - 0.5f;
  }
  __device__ float weight(int32_t pixel) const {
    const float away = static_cast<float>(pixel) - centre;
    const float w = 1.0f - (away < 0 ? -away : away) * slope;
    return w > 0 ? w : 0.0f;
  }
};

template <class Pixel>
__device__ inline float resampled(const Pixel* plane, int64_t row_stride, const Axis& rows,
                                  const Axis& columns, int32_t row, int32_t column) {
  const Taps y(rows, row), x(columns, column);
  float sum = 0, weights_y = 0, weights_x = 0;
#pragma unroll 1
  for (int32_t i = y.first; i < y.end; ++i) {
    const Pixel* line = plane + i * row_stride;
    const float weight = y.weight(i);
    float across = 0;
    weights_x = 0;
#pragma unroll 4
    for (int32_t j = x.first; j < x.end; ++j) {
      const float w = x.weight(j);
      across = fused(w, static_cast<float>(__ldg(line + j)), across);
      weights_x += w;
    }
    sum = fused(weight, across, sum);
    weights_y += weight;
  }
  return sum / (weights_y * weights_x);
}

// Of pixels (row, column) to (row, column + 7) of a channel of a view, those of `wanted` (bit i for
// column + i) into x; the others of x stay, and their columns may lie outside the view.
template <class Pixel>
__device__ inline void see_eight(const Views& v, const Sight<Pixel>& sight, Spot at,
                                 uint32_t wanted, float (&x)[8]) {
  const Pixel* plane = sight.image + at.channel * v.channel_stride;
  if (sight.native) {
    const Pixel* from = plane + at.row * v.row_stride + at.column;
    float seen[8];
    if (at.column >= 0 && at.column + 8 <= v.source_w && aligned(from, load_alignment<Pixel>)) {
      load_eight(from, seen);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        seen[i] = wanted >> i & 1 ? static_cast<float>(__ldg(from + i)) : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (wanted >> i & 1) x[i] = seen[i] * sight.scale + sight.shift;
    }
    return;
  }
  // A loop whose eight results turn through the registers: eight copies of it would spill.
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    float value = x[0];
    if (wanted >> i & 1) {
      value = resampled(plane, v.row_stride, sight.rows, sight.columns, at.row, at.column + i) *
                  sight.scale + sight.shift;
    }
#pragma unroll
    for (int k = 0; k < 7; ++k) x[k] = x[k + 1];
    x[7] = value;
  }
}

template <class Pixel>
__device__ inline float see_one(const Views& v, const Sight<Pixel>& sight, Spot at) {
  const Pixel* plane = sight.image + at.channel * v.channel_stride;
  const float pixel =
      sight.native
          ? static_cast<float>(__ldg(plane + at.row * v.row_stride + at.column))
          : resampled(plane, v.row_stride, sight.rows, sight.columns, at.row, at.column);
  return pixel * sight.scale + sight.shift;
}

// Which of eight neighbours are hidden, as bits. Cells are pixels or patches.
__device__ inline uint32_t hidden_eight(const Views& v, const bool* mask, int32_t unit, int64_t b,
                                        Spot at) {
  if (mask == nullptr) return 0;
  if (unit != 1) return mask[b * v.patches() + at.patch] ? 0xFF : 0;
  const bool* cells = mask + (b * v.out_h + at.row) * v.out_w + at.column;
  uint32_t bits = 0;
  if (aligned(cells, 8)) {
    const uint2 w = *reinterpret_cast<const uint2*>(cells);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits |= (w.x >> 8 * i & 1) << i | (w.y >> 8 * i & 1) << (4 + i);
    }
  } else {
    for (int i = 0; i < 8; ++i) bits |= static_cast<uint32_t>(cells[i]) << i;
  }
  return bits;
}

}  // namespace spcxr
