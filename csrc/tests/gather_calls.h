// Random calls of the fused input path, in buffers whose ends a sanitizer sees.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "core/views.h"

namespace spcxr {

inline std::mt19937 draws(1);

inline int32_t whole(int32_t low, int32_t high) {
  return low + static_cast<int32_t>(draws() % (high - low + 1));
}
inline float real(float low, float high) {
  return low + (high - low) * static_cast<float>(draws() % 4097) / 4096;
}

// Exactly `count` elements at a multiple of 16 bytes (or one element past it), so that a sanitizer
// sees the first byte before or after.
template <class T>
struct Buffer {
  std::unique_ptr<char[]> bytes;
  size_t count;
  T* data;

  explicit Buffer(size_t n, bool odd = false)
      : bytes(new char[(n + odd) * sizeof(T) + 1]), count(n),
        data(reinterpret_cast<T*>(bytes.get()) + odd) {
    std::memset(bytes.get(), 0xA5, (n + odd) * sizeof(T));
  }
  T& operator[](size_t i) { return data[i]; }
};

template <class T>
constexpr PixelType pixel_type =
    sizeof(T) == 1 ? PixelType::kUInt8 : sizeof(T) == 2 ? PixelType::kUInt16 : PixelType::kFloat32;

enum class Boxes { kNone, kFlips, kSame, kCrops, kWild };

// One random call.
template <class Pixel>
struct Call {
  Views v{};
  Fill f{};
  std::unique_ptr<Buffer<Pixel>> pixels;
  Buffer<float> boxes, scale, shift;
  Buffer<bool> flip, mask;
  Buffer<int32_t> kind, blocks, sources;
  Buffer<int64_t> partner, ids;

  Call(int64_t count, int32_t patch, int32_t unit, Boxes law)
      : boxes(4 * count), scale(count), shift(count), flip(count), mask(0), kind(count),
        blocks(0), sources(0), partner(count), ids(count) {
    const bool native = law <= Boxes::kSame;
    v.count = count;
    v.channels = whole(0, 1) * 2 + 1;
    v.patch = patch;
    const int32_t most = patch > 8 ? 3 : 5;
    v.out_h = patch * whole(1, most), v.out_w = patch * whole(1, most);
    v.source_h = native ? v.out_h : whole(1, 70), v.source_w = native ? v.out_w : whole(1, 70);
    v.row_stride = v.source_w + (whole(0, 1) ? 0 : whole(1, 9));
    v.channel_stride = v.row_stride * v.source_h + whole(0, 3);
    v.image_stride = v.channel_stride * v.channels;
    pixels.reset(new Buffer<Pixel>(count * v.image_stride, whole(0, 3) == 0));
    for (size_t i = 0; i < pixels->count; ++i) {
      (*pixels)[i] = static_cast<Pixel>(sizeof(Pixel) == 4 ? real(-2, 3) : real(0, 250));
    }
    v.pixels = pixels->data;
    v.pixel_type = pixel_type<Pixel>;
    for (int64_t b = 0; b < count; ++b) {
      scale[b] = real(-0.02f, 0.02f), shift[b] = real(-1, 1);
      set_box(b, law);
    }
    v.boxes = law <= Boxes::kFlips ? nullptr : boxes.data;
    v.flip = law == Boxes::kNone ? nullptr : flip.data;
    v.scale = scale.data, v.shift = shift.data;
    hide(unit);
  }

  void set_box(int64_t b, Boxes law) {
    float* box = &boxes[b * 4];
    flip[b] = law != Boxes::kSame && whole(0, 1);
    box[0] = box[1] = 0;
    box[2] = static_cast<float>(v.source_h), box[3] = static_cast<float>(v.source_w);
    if (law == Boxes::kCrops && whole(0, 4) != 0) {
      for (int axis = 0; axis < 2; ++axis) {
        const float side = box[2 + axis];
        box[2 + axis] = real(0.05f, 1) * side;
        box[axis] = real(0, 1) * (side - box[2 + axis]);
      }
    }
    if (law == Boxes::kWild) {
      const float wild[] = {NAN, INFINITY, -INFINITY, 1e30f, -1e30f, 0, -3, 5, 1e9f};
      for (int i = 0; i < 4; ++i) box[i] = wild[whole(0, 8)];
    }
  }

  void hide(int32_t unit) {
    f.unit = unit;
    const int64_t cells = v.count * (v.out_h / unit) * (v.out_w / unit);
    mask = Buffer<bool>(cells);
    const int law = whole(0, 5);  // all, none, some
    const int32_t most = whole(0, 1) ? 1 : 255;  // a true bool may be any byte but 0
    for (int64_t i = 0; i < cells; ++i) {
      const bool hidden = law == 0 || (law > 1 && whole(0, 1));
      reinterpret_cast<uint8_t*>(mask.data)[i] =
          static_cast<uint8_t>(hidden ? whole(1, most) : 0);
    }
    f.mask = mask.data;
    f.n_blocks = whole(0, 3) == 0 ? 300 : whole(0, 9);
    blocks = Buffer<int32_t>(v.count * f.n_blocks * 4);
    sources = Buffer<int32_t>(v.count * f.n_blocks * 2);
    for (int64_t i = 0; i < v.count * f.n_blocks; ++i) {
      const int32_t h = whole(0, v.out_h), w = whole(1, v.out_w);
      int32_t* block = &blocks[i * 4];
      block[0] = whole(0, v.out_h - h), block[1] = whole(0, v.out_w - w);
      block[2] = h, block[3] = h == 0 ? 0 : w;
      sources[i * 2] = whole(0, v.out_h - h), sources[i * 2 + 1] = whole(0, v.out_w - w);
    }
    for (int64_t b = 0; b < v.count; ++b) {
      kind[b] = whole(0, 3);
      partner[b] = whole(0, static_cast<int32_t>(v.count) - 1);
      ids[b] = whole(0, 1) ? kMaxImageId - 1 - b : b;
    }
    f.kind = kind.data, f.partner = partner.data;
    f.blocks = blocks.data, f.sources = sources.data;
    f.image_ids = ids.data, f.seed = (int64_t{7} << 32) + 5, f.epoch = 3, f.view = 1;
  }

  float view(int64_t b, int32_t channel, int32_t row, int32_t column) const {
    return view_value(v, b, row_axis(v, b), column_axis(v, b), channel, row, column);
  }
  bool exact(int64_t b) const { return row_axis(v, b).identity() && column_axis(v, b).identity(); }
};

}  // namespace spcxr
