// Drawn calls of patch_gather.h, and the numbers of tokens by their definition. For tests.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "core/patch_gather.h"

#define CHECK(held)                                                                        \
  do {                                                                                     \
    if (!(held)) {                                                                         \
      std::fprintf(stderr, "%s:%d: %s (call %d)\n", __FILE__, __LINE__, #held, g_call);    \
      std::exit(1);                                                                        \
    }                                                                                      \
  } while (0)

using namespace spcxr;

namespace {

int g_call = -1;
class Dice {
 public:
  explicit Dice(int64_t seed) : stream_(make_stream(seed, 0, 0, 9)) {}
  uint32_t word() {
    const uint32_t i = next_++;
    return stream_(i / 4).w[i % 4];
  }
  int32_t below(int32_t n) { return static_cast<int32_t>(spcxr::below(word(), n)); }
  int32_t between(int32_t low, int32_t high) { return low + below(high - low + 1); }
  float unit() { return static_cast<float>(word() >> 8) * 0x1p-24f; }

 private:
  Stream stream_;
  uint32_t next_ = 0;
};

uint16_t bfloat16(float value) {  // by the definition: the nearer of two neighbours
  const uint32_t bits = float_to_bits(value), low = bits & 0xFFFF0000u;
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  const uint32_t rest = bits & 0xFFFFu;
  const bool up = rest > 0x8000u || (rest == 0x8000u && (bits >> 16 & 1));
  return static_cast<uint16_t>((low >> 16) + up);
}

uint16_t float16(float value) {  // in double, where a scaled half is a whole number
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = bits >> 16 & 0x8000;
  if (value != value) return static_cast<uint16_t>(sign | 0x7E00 | (bits >> 13 & 0x3FF));
  const double size = std::fabs(static_cast<double>(value));
  if (size >= 65520) return sign | 0x7C00;
  if (size == 0) return sign;
  int exponent = 0;
  std::frexp(size, &exponent);
  exponent = exponent < -13 ? -13 : exponent;
  const double whole = std::nearbyint(std::ldexp(size, 11 - exponent));  // below 2**11, or equal
  return static_cast<uint16_t>(sign | ((exponent + 13) * 1024 + static_cast<int>(whole)));
}

double from_float16(uint16_t half) {
  const int exponent = half >> 10 & 31, rest = half & 1023;
  const double size = exponent == 31  ? (rest ? NAN : INFINITY)
                      : exponent == 0 ? std::ldexp(rest, -24)
                                      : std::ldexp(1024 + rest, exponent - 25);
  return half & 0x8000 ? -size : size;
}

size_t bytes_of(TokenType type) { return type == TokenType::kFloat32 ? 4 : 2; }

double token_at(const void* tokens, TokenType type, int64_t i) {
  if (type == TokenType::kFloat32) return static_cast<const float*>(tokens)[i];
  const uint16_t bits = static_cast<const uint16_t*>(tokens)[i];
  return type == TokenType::kBFloat16 ? bits_to_float(uint32_t{bits} << 16) : from_float16(bits);
}

uint32_t bits_at(const void* tokens, TokenType type, int64_t i) {
  if (type == TokenType::kFloat32) return float_to_bits(static_cast<const float*>(tokens)[i]);
  return static_cast<const uint16_t*>(tokens)[i];
}

uint32_t bits_of(float value, TokenType type) {
  if (type == TokenType::kFloat32) return float_to_bits(value);
  return type == TokenType::kBFloat16 ? bfloat16(value) : float16(value);
}

// Exactly as long as asked, so that a sanitizer sees a step beyond; poisoned.
struct Memory {
  explicit Memory(size_t bytes) : size(bytes), data(new uint8_t[bytes ? bytes : 1]) {
    std::memset(data.get(), 0xA5, bytes);
  }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data.get());
  }
  size_t size;
  std::unique_ptr<uint8_t[]> data;
};

// A drawn call and all it points to.
struct Call {
  Views v{};
  Fill f{};
  TokenType type;
  Memory pixels{0}, mask{0};
  std::vector<float> boxes, scale, shift;
  std::unique_ptr<bool[]> flip;
  std::vector<int32_t> kind, blocks, sources;
  std::vector<int64_t> partner, ids;

  explicit Call(Dice& dice) {
    const int32_t patches[] = {4, 8, 14, 16, 5, 20};
    v.patch = patches[dice.below(dice.below(4) ? 4 : 6)];
    v.channels = dice.below(3) ? 1 : 3;
    v.out_h = v.patch * dice.between(1, 4);
    v.out_w = v.patch * dice.between(1, 5);
    v.count = dice.between(2, 3);
    const bool whole = dice.below(3) == 0;
    v.source_h = whole ? v.out_h : dice.between(1, 90);
    v.source_w = whole ? v.out_w : dice.between(1, 90);
    v.pixel_type = static_cast<PixelType>(dice.below(3));
    type = static_cast<TokenType>(dice.below(3));
    draw_pixels(dice);
    draw_boxes(dice, whole);
    draw_fill(dice);
  }

  void draw_pixels(Dice& dice) {
    v.row_stride = v.source_w + dice.below(2) * dice.between(1, 9);
    v.channel_stride = v.row_stride * v.source_h + dice.below(2) * 7;
    v.image_stride = v.channel_stride * v.channels + dice.below(2) * 5;
    const int64_t last = (v.count - 1) * v.image_stride + (v.channels - 1) * v.channel_stride +
                         (v.source_h - 1) * v.row_stride + v.source_w;
    const size_t each = v.pixel_type == PixelType::kUInt8 ? 1 : v.pixel_type == PixelType::kUInt16 ? 2 : 4;
    pixels = Memory(size_t(last) * each);
    for (int64_t i = 0; i < last; ++i) {
      if (each == 1) pixels.as<uint8_t>()[i] = static_cast<uint8_t>(dice.word());
      if (each == 2) pixels.as<uint16_t>()[i] = static_cast<uint16_t>(dice.word());
      if (each == 4) pixels.as<float>()[i] = dice.unit() * 300 - 20;
    }
    v.pixels = pixels.as<void>();
    for (int64_t b = 0; b < v.count; ++b) {
      scale.push_back((dice.unit() + 0.1f) / (each == 2 ? 20000.0f : 100.0f));
      shift.push_back(dice.unit() - 1);
    }
    v.scale = scale.data();
    v.shift = shift.data();
  }

  void draw_boxes(Dice& dice, bool whole) {
    flip.reset(new bool[size_t(v.count)]);
    const auto extent = [&](int32_t source) {
      const int32_t how = dice.below(4);
      return how == 0 ? dice.unit() * 0.01f + 0.001f : (how == 1 ? 1.0f : dice.unit()) * source;
    };
    for (int64_t b = 0; b < v.count; ++b) {
      flip[b] = dice.below(2) && !(whole && dice.below(2));
      float h = extent(v.source_h), w = extent(v.source_w);
      h = h > 0 ? h : 1e-3f;
      w = w > 0 ? w : 1e-3f;
      const float box[] = {dice.unit() * (v.source_h - h), dice.unit() * (v.source_w - w), h, w};
      boxes.insert(boxes.end(), box, box + 4);
    }
    v.flip = dice.below(3) ? flip.get() : nullptr;
    v.boxes = whole && dice.below(3) ? nullptr : boxes.data();
  }

  void draw_fill(Dice& dice) {
    f.unit = dice.below(2) ? 1 : v.patch;
    const int64_t cells = v.count * (v.out_h / f.unit) * (v.out_w / f.unit);
    mask = Memory(size_t(cells));
    const int32_t density = dice.below(5), run = dice.between(1, 40);
    const int32_t most = dice.below(2) ? 1 : 255;  // a true bool may be any byte but 0
    for (int64_t i = 0; i < cells; ++i) {
      const bool hidden =
          i > 0 && dice.below(run) ? flag(mask.as<bool>(), i - 1) : dice.below(4) < density;
      mask.as<uint8_t>()[i] = static_cast<uint8_t>(hidden ? dice.between(1, most) : 0);
    }
    f.mask = mask.as<bool>();
    f.n_blocks = dice.below(6);
    for (int64_t b = 0; b < v.count; ++b) {
      kind.push_back(dice.below(4));
      partner.push_back((b + 1) % v.count);
      ids.push_back(int64_t{dice.word()} << dice.below(16));
      for (int32_t k = 0; k < f.n_blocks; ++k) {
        const int32_t h = dice.below(v.out_h + 1), w = h ? dice.between(1, v.out_w) : 0;
        blocks.insert(blocks.end(), {dice.between(0, v.out_h - h), dice.between(0, v.out_w - w), h, w});
        sources.insert(sources.end(), {dice.between(0, v.out_h - h), dice.between(0, v.out_w - w)});
      }
    }
    f.kind = kind.data();
    f.partner = partner.data();
    f.blocks = blocks.data();
    f.sources = sources.data();
    f.image_ids = ids.data();
    f.seed = int64_t{dice.word()} << 20;
    f.epoch = dice.word();
    f.view = static_cast<uint32_t>(dice.below(3));
  }

  // Rounding of the resampled sum, in units of the pixels' size.
  double tolerance(int64_t b) const {
    const double most = v.pixel_type == PixelType::kUInt16 ? 65535 : 300;
    return 3e-6 * most * v.scale[b] + 1e-6;
  }
  bool exact(int64_t b) const {
    return row_axis(v, b).identity() && column_axis(v, b).identity();
  }
  float clean(int64_t b, int32_t c, int32_t row, int32_t column) const {
    return view_value(v, b, row_axis(v, b), column_axis(v, b), c, row, column);
  }
};

struct Element {
  int32_t channel, row, column;
};

Element element(const Views& v, int32_t patch, int32_t e) {
  const int32_t area = v.patch * v.patch, inside = e % area;
  return Element{e / area, patch / v.grid_w() * v.patch + inside / v.patch,
                 patch % v.grid_w() * v.patch + inside % v.patch};
}

}  // namespace
