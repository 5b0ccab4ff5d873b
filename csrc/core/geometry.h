// Index arithmetic of rectangles on a grid; host and device.
#pragma once

#include "core/philox.h"

namespace spcxr {

struct Rect {
  int32_t top, left, height, width;
};

SPCXR_HD int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

// A rectangle with its corner inside a height x width grid and sides of at most the grid's is cut
// at the border; on a torus what passes the border comes back at the other side. Piece 0 is the
// inside, bit 0 of p names what came back by columns, bit 1 by rows. Many are empty: height 0.
SPCXR_HD Rect piece(Rect r, int32_t p, int32_t height, int32_t width, bool torus) {
  const int32_t h = smaller(r.height, height - r.top), w = smaller(r.width, width - r.left);
  const bool by_row = p & 2, by_column = p & 1;
  const Rect cut{by_row ? 0 : r.top, by_column ? 0 : r.left, by_row ? r.height - h : h,
                 by_column ? r.width - w : w};
  const bool empty = cut.height == 0 || cut.width == 0 || (p != 0 && !torus);
  return empty ? Rect{0, 0, 0, 0} : cut;
}

}  // namespace spcxr
