#include "core/patch_checks.h"

#include <cmath>

namespace spcxr {
namespace {

bool side(int32_t pixels) { return pixels >= 1 && pixels <= kMaxViewSide; }

// One axis of a box: the rule of check_boxes in spcxr/ops/crop_resize.py.
bool inside(float start, float extent, int32_t source) {
  const float border = static_cast<float>(source);
  return start >= -kBorderSlack && extent > 0 && start + extent <= border + kBorderSlack;
}

bool inside(const int32_t* corner, int32_t height, int32_t width, const Views& v) {
  return corner[0] >= 0 && corner[1] >= 0 && height <= v.out_h && width <= v.out_w &&
         corner[0] <= v.out_h - height && corner[1] <= v.out_w - width;
}

const char* refuse_shuffle(const Views& v, const Fill& f, int64_t b) {
  if (f.n_blocks > 0 && (f.blocks == nullptr || f.sources == nullptr)) {
    return "shuffle: give blocks [B, K, 4] and sources [B, K, 2]";
  }
  for (int64_t k = b * f.n_blocks; k < (b + 1) * f.n_blocks; ++k) {
    const int32_t* block = f.blocks + k * 4;
    if (block[2] == 0) continue;
    if (block[2] < 0 || block[3] < 0 || !inside(block, block[2], block[3], v)) {
      return "blocks: a rectangle leaves the view; keep top + height and left + width within size";
    }
    if (!inside(f.sources + k * 2, block[2], block[3], v)) {
      return "sources: a rectangle leaves the view; keep source + the block's sides within size";
    }
  }
  return nullptr;
}

}  // namespace

const char* refuse_sizes(const Views& v) {
  if (v.count < 0) return "images: give [B, C, H, W]";
  if (v.channels != 1 && v.channels != 3) return "images: give 1 or 3 channels";
  if (!side(v.source_h) || !side(v.source_w)) return "images: sides must be 1 to 32768 pixels";
  if (!side(v.out_h) || !side(v.out_w)) return "size: the view's sides must be 1 to 32768 pixels";
  if (v.patch < 1 || v.patch > kMaxPatch) return "patch: give 1 to 256 pixels";
  if (v.out_h % v.patch != 0 || v.out_w % v.patch != 0) {
    return "size: the view's sides must be whole numbers of patches";
  }
  return nullptr;
}

int32_t mask_unit(const Views& v, int64_t mask_h, int64_t mask_w) {
  if (mask_h == v.grid_h() && mask_w == v.grid_w()) return v.patch;
  if (mask_h == v.out_h && mask_w == v.out_w) return 1;
  return 0;
}

const char* const kMaskRefused = "mask: give one cell a patch of the view, or one a pixel";

const char* refuse_packed(const Views& v) {
  const bool held = v.count <= INT32_MAX / v.patches();
  return held ? nullptr : "images: 2**31 patches or more in one call; split the batch";
}

const char* refuse_noise(int64_t seed, int64_t epoch) {
  const bool held = seed >= 0 && epoch >= 0 && epoch <= INT64_C(0xFFFFFFFF);
  return held ? nullptr : "give 0 <= seed < 2**63, 0 <= epoch < 2**32";
}

const char* refuse_boxes(const Views& v) {
  for (int64_t b = 0; b < v.count; ++b) {
    if (!std::isfinite(v.scale[b]) || !std::isfinite(v.shift[b])) {
      return "scale, shift: give finite numbers";
    }
    if (v.boxes == nullptr) continue;
    const float* box = v.boxes + b * 4;
    if (!inside(box[0], box[2], v.source_h) || !inside(box[1], box[3], v.source_w)) {
      return "boxes: top, left, height, width must be finite, not empty and inside the image";
    }
  }
  return nullptr;
}

const char* refuse_fill(const Views& v, const Fill& f) {
  if (f.mask == nullptr) return nullptr;
  if (f.kind == nullptr) return "kind: give [B] int32";
  for (int64_t b = 0; b < v.count; ++b) {
    const int32_t kind = f.kind[b];
    if (kind < kNoise || kind > kShuffle) return "kind: give 0 (noise) to 3 (shuffle)";
    if (kind == kNoise) {
      if (f.image_ids == nullptr) return "image ids: noise needs [B] int64";
      if (f.image_ids[b] < 0 || f.image_ids[b] >= kMaxImageId) {
        return "image ids: one is not in [0, 2**48); number images from 0";
      }
    }
    if (kind == kOther) {
      if (f.partner == nullptr) return "partner: the fill other needs [B] int64";
      if (f.partner[b] < 0 || f.partner[b] >= v.count) return "partner: one is no row of the batch; give 0 to B - 1";
      if (f.partner[b] == b) return "partner: an image cannot fill itself; use another kind";
    }
    if (kind == kShuffle) {
      const char* reason = refuse_shuffle(v, f, b);
      if (reason != nullptr) return reason;
    }
  }
  return nullptr;
}

}  // namespace spcxr
