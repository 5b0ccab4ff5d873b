// Why a call of patch_gather.h cannot be served: null, or one line that names argument and remedy.
// Free of frameworks; the bindings (torch_ops.cpp, pybind.cpp) call these, in this order:
//   refuse_sizes(views), then mask_unit(views, h, w)   numbers alone, no pointer is followed
//   refuse_noise(seed, epoch)                          when a fill is given
//   refuse_boxes(views), refuse_fill(views, fill)      read host memory: CPU alone
#pragma once

#include "core/views.h"

namespace spcxr {

constexpr int32_t kMaxViewSide = 1 << 15;
constexpr int32_t kMaxPatch = 256;
constexpr float kBorderSlack = 1e-3f;  // pixels: what float32 may add at the border (crop_resize.py)

// Sizes of source, view and patch. count (B) may be 0.
const char* refuse_sizes(const Views& views);

// Pixels a side of one cell of a mask of this grid: the patch or 1; 0 when it is neither.
int32_t mask_unit(const Views& views, int64_t mask_h, int64_t mask_w);
extern const char* const kMaskRefused;  // the message for 0

// More patches than int32 counts, for the packed rows of visible_patch_gather.
const char* refuse_packed(const Views& views);

const char* refuse_noise(int64_t seed, int64_t epoch);

// Finite boxes inside the image with an area; finite scale and shift.
const char* refuse_boxes(const Views& views);

// Kinds, partners of kOther images, blocks and sources of kShuffle images, image ids; a pointer that
// a kind needs and that is null.
const char* refuse_fill(const Views& views, const Fill& fill);

}  // namespace spcxr
