// Where an element of the tokens lies in its view, without a division on the device.
#pragma once

#include "core/views.h"

namespace spcxr {

// n / by for n < 2**31, as a multiplication: multiplier = ceil(2**shift / by), and shift is 31
// plus the logarithm of `by`, rounded up.
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
  int32_t patch, element;        // of the image, of the patch
  int32_t channel, row, column;  // row and column in the view
};

// Patches are made in pieces: `width` columns of `deep` lines, patch / deep lines apart.
struct Layout {
  Divisor row, plane, side, grid_w;  // pieces of a patch, a channel and a line of it; patches
  uint32_t width, patch;
  uint32_t patches, pieces, row_length;  // of an image; elements of a patch

  SPCXR_HD Spot spot(uint32_t patch_number, uint32_t piece) const {
    const uint32_t channel = plane(piece), in_plane = piece - channel * plane.by;
    const uint32_t line = side(in_plane), right = (in_plane - line * side.by) * width;
    const uint32_t grid_row = grid_w(patch_number);
    return Spot{static_cast<int32_t>(patch_number),
                static_cast<int32_t>((channel * patch + line) * patch + right),
                static_cast<int32_t>(channel), static_cast<int32_t>(grid_row * patch + line),
                static_cast<int32_t>((patch_number - grid_row * grid_w.by) * patch + right)};
  }
  SPCXR_HD Spot spot(uint32_t piece) const {  // of the image
    const uint32_t patch_number = row(piece);
    return spot(patch_number, piece - patch_number * row.by);
  }
  // Element of the image's tokens.
  SPCXR_HD uint32_t index(const Spot& at) const { return at.patch * row_length + at.element; }
};

inline Layout make_layout(const Views& v, int32_t width, int32_t deep) {
  const int32_t line = v.patch / width, plane = line * v.patch / deep, row = plane * v.channels;
  const auto u = [](int32_t n) { return static_cast<uint32_t>(n); };
  return Layout{make_divisor(row), make_divisor(plane), make_divisor(line),
                make_divisor(v.grid_w()), u(width), u(v.patch),
                u(v.patches()), u(v.patches() * row), u(v.row_length())};
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
