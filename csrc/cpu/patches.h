// One image's patches, clean: cut out of the pixels where the view is the image itself, resampled
// otherwise. Internal to kernels_body.h.
#pragma once

#include "cpu/resample.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

template <typename Pixel>
void convert_to(TokenType type, const Pixel* pixels, int32_t n, float scale, float shift,
                void* tokens) {
  with_type(type, tokens, [&](auto token, auto* out) {
    convert<decltype(token)>(pixels, n, scale, shift, out);
  });
}

// Rows of 16 pixels, `count` of them.
template <typename Pixel>
void convert_rows16(TokenType type, const Pixel* pixels, int64_t stride, int32_t count, float scale,
                    float shift, void* tokens) {
  with_type(type, tokens, [&](auto token, auto* out) {
    for (int32_t r = 0; r < count; ++r) {
      convert<decltype(token)>(pixels + r * stride, 16, scale, shift, out + r * 16);
    }
  });
}

// `rows` rows of p numbers from one place to another; p is known to the compiler where that is
// faster than a call of memcpy.
template <int p, typename T>
void copy_rows(const T* from, int64_t from_stride, int32_t rows, T* to, int64_t to_stride) {
  for (int32_t r = 0; r < rows; ++r) {
    std::memcpy(to + r * to_stride, from + r * from_stride, p * sizeof(T));
  }
}

template <typename T>
void copy_square(const T* from, int64_t from_stride, int32_t p, T* to, int64_t to_stride) {
  if (p == 16) return copy_rows<16>(from, from_stride, p, to, to_stride);
  if (p == 14) return copy_rows<14>(from, from_stride, p, to, to_stride);
  if (p == 8) return copy_rows<8>(from, from_stride, p, to, to_stride);
  for (int32_t r = 0; r < p; ++r) {
    std::memcpy(to + r * to_stride, from + r * from_stride, p * sizeof(T));
  }
}

// What the images of a call share.
struct Bench {
  Bench(Parts& parts, const Views& views)
      : resampler(parts, views),
        strips(parts.take<float>(views.grid_w() * Resampler::slot(views))),
        cut(parts.take<float>(views.row_length())) {}

  Resampler resampler;
  float* strips;  // of one row of patches
  float* cut;     // one patch as it stands in the pixels, of whatever type they are
};

class Patches {
 public:
  Patches(Parts& parts, const Views& views, const Bench& bench)
      : v_(views),
        bench_(bench),
        rows_(parts, views.source_h, views.out_h),
        columns_(parts, views.source_w, views.out_w) {}

  void open(int64_t b) {
    b_ = b;
    const Axis rows = row_axis(v_, b), columns = column_axis(v_, b);
    whole_ = rows.identity() && columns.identity();
    if (whole_) return;
    rows_.follow(rows);
    columns_.follow(columns);
  }

  // Makes the wanted patches of a row of patches ready for `write`.
  void row(int32_t patch_row, const bool* wanted) {
    patch_row_ = patch_row;
    if (!whole_) bench_.resampler(b_, rows_, columns_, patch_row, wanted, bench_.strips);
  }

  // [C * P * P] values of one of them.
  void write(int32_t patch_column, TokenType type, void* out) const {
    if (!whole_) {
      convert_to(type, bench_.strips + patch_column * Resampler::slot(v_), v_.row_length(),
                 v_.scale[b_], v_.shift[b_], out);
    } else if (v_.pixel_type == PixelType::kUInt8) {
      copy<uint8_t>(patch_column, type, out);
    } else if (v_.pixel_type == PixelType::kUInt16) {
      copy<uint16_t>(patch_column, type, out);
    } else {
      copy<float>(patch_column, type, out);
    }
  }

 private:
  template <typename Pixel>
  void copy(int32_t patch_column, TokenType type, void* out) const {
    const float scale = v_.scale[b_], shift = v_.shift[b_];
    const Pixel* from = static_cast<const Pixel*>(v_.pixels) + b_ * v_.image_stride +
                        patch_row_ * v_.patch * v_.row_stride + patch_column * v_.patch;
    if (v_.patch == 16) {
      uint8_t* const bytes = static_cast<uint8_t*>(out);
      for (int32_t c = 0; c < v_.channels; ++c, from += v_.channel_stride) {
        convert_rows16(type, from, v_.row_stride, 16, scale, shift,
                       bytes + c * 256 * token_size(type));
      }
      return;
    }
    Pixel* const cut = reinterpret_cast<Pixel*>(bench_.cut);
    for (int32_t c = 0; c < v_.channels; ++c, from += v_.channel_stride) {
      copy_square(from, v_.row_stride, v_.patch, cut + c * v_.patch * v_.patch, v_.patch);
    }
    convert_to(type, cut, v_.row_length(), scale, shift, out);
  }

  const Views& v_;
  const Bench& bench_;
  Taps rows_, columns_;
  int64_t b_ = 0;
  int32_t patch_row_ = 0;
  bool whole_ = false;
};

// What of each patch a mask hides. A mask of one cell a patch and one of one cell a pixel look alike
// from here.
class Cover {
 public:
  enum State : uint8_t { kNone, kSome, kAll };

  Cover(Parts& parts, const Views& views, const bool* mask, int32_t unit)
      : v_(views), mask_(mask), unit_(unit), bytes_(parts.take<uint8_t>(views.row_length() + 16)) {}

  State state(int64_t b, int32_t patch) const {
    if (mask_ == nullptr) return kNone;
    if (unit_ == v_.patch) return mask_[b * v_.patches() + patch] ? kAll : kNone;
    const uint8_t* cells = first(b, patch);
    constexpr uint64_t kOnes = 0x0101010101010101u;  // cells are 0 or 1
    uint64_t some = 0, all = kOnes, eight;
    for (int32_t r = 0; r < v_.patch; ++r, cells += v_.out_w) {
      int32_t j = 0;
      for (; j + 8 <= v_.patch; j += 8) {
        std::memcpy(&eight, cells + j, 8);
        some |= eight;
        all &= eight;
      }
      for (; j < v_.patch; ++j) {
        some |= cells[j];
        all &= cells[j] * kOnes;
      }
    }
    return some == 0 ? kNone : all == kOnes ? kAll : kSome;
  }

  // 1 for every hidden element of the patch, after `ahead` < 4 bytes of 0 and with 4 more behind.
  const uint8_t* elements(int64_t b, int32_t patch, int32_t ahead) const {
    const int32_t area = v_.patch * v_.patch, length = v_.row_length();
    std::memset(bytes_, 0, 4);
    uint8_t* const one = bytes_ + ahead;
    if (unit_ == v_.patch) {
      std::memset(one, mask_[b * v_.patches() + patch], size_t(length));
    } else {
      copy_square(first(b, patch), v_.out_w, v_.patch, one, v_.patch);
      for (int32_t c = 1; c < v_.channels; ++c) std::memcpy(one + c * area, one, size_t(area));
    }
    std::memset(one + length, 0, 4);
    return bytes_;
  }

 private:
  const uint8_t* first(int64_t b, int32_t patch) const {
    const int64_t row = patch / v_.grid_w() * v_.patch, column = patch % v_.grid_w() * v_.patch;
    return reinterpret_cast<const uint8_t*>(mask_) + (b * v_.out_h + row) * v_.out_w + column;
  }

  const Views& v_;
  const bool* mask_;
  int32_t unit_;
  uint8_t* bytes_;
};

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
