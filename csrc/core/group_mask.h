// group_mask: unions of random rectangles. The law in whole numbers is `Law` of
// spcxr/ops/group_mask.py; every backend does this integer arithmetic and nothing else, so that
// the groups of an image are the same bits everywhere.
#pragma once

#include <cstdint>

#include "core/geometry.h"
#include "core/philox.h"

namespace spcxr {

constexpr uint32_t kGroupsStream = 1;  // STREAMS["groups"]
constexpr int32_t kMaxSide = 4096;

struct Law {
  int32_t grid_h, grid_w;
  uint32_t target_low, target_span;                     // masked cells, in 1/128 cell
  uint32_t height_low, height_span, width_low, width_span;  // block sides, in 1/65536 unit
  bool torus;
  int32_t max_blocks;

  SPCXR_HD int64_t cells() const { return int64_t{grid_h} * grid_w; }
};

// The fewest cells that may be masked. Block 0 of the stream.
SPCXR_HD int32_t draw_target(const Law& law, const Stream& stream) {
  const uint32_t drawn = law.target_low + below(stream(0).w[0], law.target_span);
  return static_cast<int32_t>((drawn + 127) >> 7);
}

SPCXR_HD int32_t draw_side(uint32_t word, uint32_t low, uint32_t span, int32_t most) {
  return smaller(static_cast<int32_t>((low + below(word, span) + 32768) >> 16), most);
}

// A corner is uniform over the grid on a torus, and short of the last row and column otherwise.
SPCXR_HD int32_t draw_corner(uint32_t word, int32_t side, bool torus) {
  return static_cast<int32_t>(below(word, torus || side == 1 ? side : side - 1));
}

// The j-th rectangle, not yet cut at the border: block 1 + j of the stream.
SPCXR_HD Rect draw_rect(const Law& law, const Stream& stream, int32_t j) {
  const Words u = stream(1 + static_cast<uint32_t>(j));
  return Rect{draw_corner(u.w[0], law.grid_h, law.torus),
              draw_corner(u.w[1], law.grid_w, law.torus),
              draw_side(u.w[2], law.height_low, law.height_span, law.grid_h),
              draw_side(u.w[3], law.width_low, law.width_span, law.grid_w)};
}

SPCXR_HD Rect piece(const Law& law, const Rect& rect, int32_t p) {
  return piece(rect, p, law.grid_h, law.grid_w, law.torus);
}

// Why a law cannot be followed, or null.
const char* refuse(const Law& law);

// The law of float parameters, as Law.of in Python computes it (a test compares them).
// The default block sides are 1 to 0.3 of the grid's: give block_low = 0.
Law make_law(int32_t grid_h, int32_t grid_w, double ratio_low, double ratio_high, double block_low,
             double block_high, bool torus);

// blocks [count, max_blocks, 4] and mask [count, grid_h, grid_w] are written in full.
// Image ids must be in [0, kMaxImageId).
void group_mask_cpu(const int64_t* image_ids, int64_t count, int64_t seed, int64_t epoch,
                    const Law& law, int32_t* blocks, bool* mask);

// The same on the device, where all pointers are; returns null or CUDA's error text.
const char* group_mask_cuda(const int64_t* image_ids, int64_t count, int64_t seed, int64_t epoch,
                            const Law& law, int32_t* blocks, bool* mask, void* cuda_stream);

}  // namespace spcxr
