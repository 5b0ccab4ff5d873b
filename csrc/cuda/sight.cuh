// What one thread sees of a view: eight neighbours of a row, or one pixel.
#pragma once

#include "core/views.h"
#include "cuda/layout.cuh"
#include "cuda/tokens.cuh"

namespace spcxr {

// An image's box, read once a thread. `kWhole`: known to be the whole image at its own size.
template <class Pixel, bool kWhole = false>
struct Sight {
  Axis rows, columns;
  float scale, shift;
  const Pixel* image;

  __device__ Sight(const Views& v, int64_t b)
      : rows(row_axis(v, b)),
        columns(column_axis(v, b)),
        scale(v.scale[b]),
        shift(v.shift[b]),
        image(static_cast<const Pixel*>(v.pixels) + b * v.image_stride) {}
  __device__ const Pixel* place(const Views& v, Spot at) const {
    return image + at.channel * v.channel_stride + at.row * v.row_stride + at.column;
  }
  __device__ bool native() const { return kWhole || (rows.identity() && columns.identity()); }
};

// One axis of one output: its first tap with a weight, one past its last candidate, and weights.
struct Taps {
  int32_t first, end;
  float centre, slope;

  __device__ Taps(const Axis& axis, float slope, int32_t i) : slope(slope) {
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

__device__ inline float number(uint8_t pixel) { return small(pixel); }
__device__ inline float number(uint16_t pixel) { return small(pixel); }
__device__ inline float number(float pixel) { return pixel; }

// Where a row's outputs are resampled from.
template <class Pixel>
struct Line {
  const Pixel* plane;
  int32_t row_stride;
  Axis columns;
  Taps y;
  float slope;  // of the columns' triangle

  __device__ Line(const Views& v, const Pixel* plane, const Axis& rows, const Axis& columns,
                  int32_t row)
      : plane(plane),
        row_stride(static_cast<int32_t>(v.row_stride)),
        columns(columns),
        y(rows, 1.0f / rows.reach, row),
        slope(1.0f / columns.reach) {}

  __device__ float operator()(int32_t column) const {
    const Taps x(columns, slope, column);
    float sum = 0, weights_y = 0, weights_x = 0;
#pragma unroll 1
    for (int32_t i = y.first; i < y.end; ++i) {
      const Pixel* line = plane + i * row_stride;
      const float weight = y.weight(i);
      float across = 0;
      weights_x = 0;
#pragma unroll 2
      for (int32_t j = x.first; j < x.end; ++j) {
        const float w = x.weight(j);
        across = fused(w, number(__ldg(line + j)), across);
        weights_x += w;
      }
      sum = fused(weight, across, sum);
      weights_y += weight;
    }
    return __fdividef(sum, weights_y * weights_x);
  }
};

// The same where kTaps pixels of each axis are enough: 2 * reach, rounded up. Pixels past the end
// are read at the border and have no weight.
template <class Pixel, int kTaps>
struct ShortLine {
  const Pixel* plane;
  Axis columns;
  float slope, weights_y;
  float weight[kTaps];
  int32_t down[kTaps];

  __device__ explicit ShortLine(const Line<Pixel>& line, const Axis& rows)
      : plane(line.plane), columns(line.columns), slope(line.slope), weights_y(0) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      const int32_t i = line.y.first + t;
      weight[t] = i < line.y.end ? line.y.weight(i) : 0.0f;
      down[t] = smaller(i, rows.source - 1) * line.row_stride;
      weights_y += weight[t];
    }
  }
  __device__ float operator()(int32_t column) const {
    const Taps x(columns, slope, column);
    float sum = 0, weights_x = 0;
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      const int32_t j = x.first + t;
      const Pixel* from = plane + smaller(j, columns.source - 1);
      const float w = j < x.end ? x.weight(j) : 0.0f;
      float along = 0;
#pragma unroll
      for (int s = 0; s < kTaps; ++s) {
        along = fused(weight[s], number(__ldg(from + down[s])), along);
      }
      sum = fused(w, along, sum);
      weights_x += w;
    }
    return __fdividef(sum, weights_y * weights_x);
  }
};

// A loop whose eight results turn through the registers: eight copies of it would spill.
template <class Line>
__device__ inline void resample_eight(const Line& line, float scale, float shift, int32_t column,
                                      uint32_t wanted, float (&x)[8]) {
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const float value = wanted >> i & 1 ? line(column + i) * scale + shift : x[0];
#pragma unroll
    for (int k = 0; k < 7; ++k) x[k] = x[k + 1];
    x[7] = value;
  }
}

template <class Pixel>
__device__ inline void copy_eight(const Pixel* from, bool inside, float scale, float shift,
                                  uint32_t wanted, float (&x)[8]) {
  float seen[8];
  if (inside && aligned(from, load_alignment<Pixel>)) {
    load_eight(from, seen);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) seen[i] = wanted >> i & 1 ? number(__ldg(from + i)) : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (wanted >> i & 1) x[i] = seen[i] * scale + shift;
  }
}

// Of pixels (row, column) to (row, column + 7) of a channel of a view, those of `wanted` (bit i for
// column + i) into x; the others of x stay, and their columns may lie outside the view.
template <class Pixel, bool kWhole>
__device__ inline void see_eight(const Views& v, const Sight<Pixel, kWhole>& sight, Spot at,
                                 uint32_t wanted, float (&x)[8]) {
  if (sight.native()) {
    const bool inside = at.column >= 0 && at.column + 8 <= v.source_w;
    copy_eight(sight.place(v, at), inside, sight.scale, sight.shift, wanted, x);
    return;
  }
  if (kWhole) return;
  const Pixel* plane = sight.image + at.channel * v.channel_stride;
  const Line<Pixel> line(v, plane, sight.rows, sight.columns, at.row);
  const float reach = fmaxf(sight.rows.reach, sight.columns.reach);
  if (reach <= 1.0f) {
    resample_eight(ShortLine<Pixel, 2>(line, sight.rows), sight.scale, sight.shift, at.column,
                   wanted, x);
  } else if (reach <= 1.5f) {
    resample_eight(ShortLine<Pixel, 3>(line, sight.rows), sight.scale, sight.shift, at.column,
                   wanted, x);
  } else {
    resample_eight(line, sight.scale, sight.shift, at.column, wanted, x);
  }
}

// The upper bit of each of four bytes: whether anything is in it, see flag().
__device__ inline uint32_t set_bytes(uint32_t bytes) {
  return (((bytes & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | bytes) & 0x80808080u;
}

// Which of eight neighbours are hidden, as bits. Cells are pixels or patches.
__device__ inline uint32_t hidden_eight(const Views& v, const Fill& f, const Layout& layout,
                                        int32_t b, Spot at) {
  if (f.mask == nullptr) return 0;
  if (f.unit != 1) return flag(f.mask, int64_t{b} * layout.patches + at.patch) ? 0xFF : 0;
  const bool* cells = f.mask + (int64_t{b} * v.out_h + at.row) * v.out_w + at.column;
  uint32_t bits = 0;
  if (aligned(cells, 8)) {
    const uint2 w = *reinterpret_cast<const uint2*>(cells);
    const uint32_t low = set_bytes(w.x), high = set_bytes(w.y);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits |= (low >> (8 * i + 7) & 1) << i | (high >> (8 * i + 7) & 1) << (4 + i);
    }
  } else {
    for (int i = 0; i < 8; ++i) bits |= static_cast<uint32_t>(flag(cells, i)) << i;
  }
  return bits;
}

// The lines of a patch that a thread makes, patch / kDeep apart: so many loads are under way at
// once, and what the lines share is computed once.
constexpr int kDeep = 4;

__device__ inline Spot lower(const Layout& layout, Spot at, int line) {
  const int32_t lines = static_cast<int32_t>(layout.patch) / kDeep * line;
  at.row += lines;
  at.element += lines * static_cast<int32_t>(layout.patch);
  return at;
}

// The fast path: whole lines of an image at its own size, where all of them are aligned.
template <class Pixel, bool kWhole>
__device__ inline bool can_copy(const Views& v, const Sight<Pixel, kWhole>& sight,
                                const Layout& layout, Spot at) {
  const Pixel* from = sight.place(v, at);
  const int64_t apart = v.row_stride * (layout.patch / kDeep) * static_cast<int64_t>(sizeof(Pixel));
  return sight.native() && aligned(from, load_alignment<Pixel>) &&
         (apart & (load_alignment<Pixel> - 1)) == 0;
}

template <class Pixel, bool kWhole, class Token>
__device__ inline void copy_lines(const Views& v, const Sight<Pixel, kWhole>& sight,
                                  const Layout& layout, Spot at, Token* tokens) {
  const Pixel* from = sight.place(v, at);
  const uint32_t lines = layout.patch / kDeep;
  const float scale = sight.scale, shift = sight.shift;
  typename Raw<Pixel>::Type raw[kDeep];
#pragma unroll
  for (int line = 0; line < kDeep; ++line) raw[line] = load_raw(from + line * lines * v.row_stride);
#pragma unroll
  for (int line = 0; line < kDeep; ++line) {
    float x[8];
    spread(raw[line], x, Pixel{});
#pragma unroll
    for (float& value : x) value = value * scale + shift;
    store_eight(tokens + line * lines * layout.patch, x);
  }
}

// Whether every view of the batch is its whole image at its own size, as a launch can know.
inline bool whole_images(const Views& v) {
  return v.boxes == nullptr && v.flip == nullptr && v.source_h == v.out_h && v.source_w == v.out_w;
}

}  // namespace spcxr
