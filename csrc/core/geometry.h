// Index arithmetic of rectangles on a grid; host and device.
#pragma once

#include "core/philox.h"

namespace spcxr {

struct Rect {
  int32_t top, left, height, width;
};

struct Pieces {
  Rect rect[4];
  int32_t count;
};

SPCXR_HD int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

// A rectangle with its corner inside a height x width grid and sides of at most the grid's, cut at
// the border; on a torus what passes the border comes back at the other side. Rows first.
SPCXR_HD Pieces cut_at_border(Rect r, int32_t height, int32_t width, bool torus) {
  const int32_t h = smaller(r.height, height - r.top), w = smaller(r.width, width - r.left);
  const int32_t below_h = torus ? r.height - h : 0, beyond_w = torus ? r.width - w : 0;
  Pieces cut{};
  cut.rect[cut.count++] = Rect{r.top, r.left, h, w};
  if (beyond_w > 0) cut.rect[cut.count++] = Rect{r.top, 0, h, beyond_w};
  if (below_h > 0) {
    cut.rect[cut.count++] = Rect{0, r.left, below_h, w};
    if (beyond_w > 0) cut.rect[cut.count++] = Rect{0, 0, below_h, beyond_w};
  }
  return cut;
}

}  // namespace spcxr
