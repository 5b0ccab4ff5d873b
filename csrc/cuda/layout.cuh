// Where an element of the tokens lies in its view, without a division on the device.
#pragma once

#include "core/views.h"

namespace spcxr {

// n / by for n < 2**31, as a multiplication: multiplier = ceil(2**shift / by), shift = 31 + log2 by.
struct Divisor {
  uint32_t by, multiplier, shift;

  SPCXR_HD uint32_t operator()(uint32_t n) const {
    return static_cast<uint32_t>(uint64_t{n} * multiplier >> shift);
  }
};

inline Divisor make_divisor(int32_t by) {
  uint32_t log = 0;
  while ((int64_t{1} << log) < by) ++log;
  const uint64_t power = uint64_t{1} << (31 + log);
  return Divisor{static_cast<uint32_t>(by), static_cast<uint32_t>((power + by - 1) / by), 31 + log};
}

struct Spot {
  int32_t patch, channel, row, column;  // row and column in the view
};

struct Layout {
  Divisor row_length, plane, side, grid_w;
  uint32_t patches, elements;  // of an image

  SPCXR_HD Spot spot(uint32_t patch, uint32_t element) const {
    const uint32_t channel = plane(element), in_plane = element - channel * plane.by;
    const uint32_t row = side(in_plane), column = in_plane - row * side.by;
    const uint32_t down = grid_w(patch), right = patch - down * grid_w.by;
    return Spot{static_cast<int32_t>(patch), static_cast<int32_t>(channel),
                static_cast<int32_t>(down * side.by + row),
                static_cast<int32_t>(right * side.by + column)};
  }
  // Of element `index` of an image's N * row_length.
  SPCXR_HD Spot spot(uint32_t index) const {
    const uint32_t patch = row_length(index);
    return spot(patch, index - patch * row_length.by);
  }
};

inline Layout make_layout(const Views& v) {
  return Layout{make_divisor(v.row_length()),
                make_divisor(v.patch * v.patch),
                make_divisor(v.patch),
                make_divisor(v.grid_w()),
                static_cast<uint32_t>(v.patches()),
                static_cast<uint32_t>(v.patches() * v.row_length())};
}

// Why the kernels cannot follow these views, or null.
inline const char* refuse(const Views& v, int32_t unit) {
  if (v.channels < 1 || v.source_h < 1 || v.source_w < 1 || v.out_h < 1 || v.out_w < 1 ||
      v.patch < 1 || v.count < 0) {
    return "a side, the channels or the patch is below 1";
  }
  if (v.out_h % v.patch != 0 || v.out_w % v.patch != 0) return "the view is no whole of patches";
  if (unit != 1 && unit != v.patch) return "a cell of the mask is a pixel or a patch";
  const int64_t elements = int64_t{v.patches()} * v.row_length();
  if (int64_t{v.out_h} * v.out_w * v.channels > INT32_MAX || elements > INT32_MAX) {
    return "a view of 2**31 elements or more";
  }
  if (v.row_stride < 0 || v.source_h * v.row_stride > INT32_MAX || v.count > INT32_MAX) {
    return "a plane of 2**31 pixels or more, or as many images";
  }
  return nullptr;
}

}  // namespace spcxr
