// One image's patches, clean: cut out of the pixels where the view is the image itself, resampled
// otherwise. Internal to kernels_body.h.
#pragma once

#include <type_traits>

#include "cpu/resample.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

// Where tokens go: their type, and whether past the caches.
struct Sink {
  TokenType type;
  bool streamed = false;
};

// Calls with a pointer of the token's type, and whether to stream.
template <typename Work>
void with_sink(Sink sink, void* tokens, const Work& work) {
  with_type(sink.type, tokens, [&](auto token, auto* out) {
    sink.streamed ? work(token, std::true_type{}, out) : work(token, std::false_type{}, out);
  });
}

template <typename Pixel>
void convert_to(Sink sink, const Pixel* pixels, int64_t n, float scale, float shift,
                void* tokens) {
  with_sink(sink, tokens, [&](auto token, auto streamed, auto* out) {
    convert<decltype(token), decltype(streamed)::value>(pixels, n, scale, shift, out);
  });
}

// Rows of 16 pixels, `count` of them.
template <typename Pixel>
void convert_rows16(Sink sink, const Pixel* pixels, int64_t stride, int32_t count, float scale,
                    float shift, void* tokens) {
  with_sink(sink, tokens, [&](auto token, auto streamed, auto* out) {
    for (int32_t r = 0; r < count; ++r) {
      convert<decltype(token), decltype(streamed)::value>(pixels + r * stride, 16, scale, shift,
                                                          out + r * 16);
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
  void write(int32_t patch_column, Sink sink, void* out) const {
    if (!whole_) {
      convert_to(sink, bench_.strips + patch_column * Resampler::slot(v_), v_.row_length(),
                 v_.scale[b_], v_.shift[b_], out);
    } else if (v_.pixel_type == PixelType::kUInt8) {
      copy<uint8_t>(patch_column, sink, out);
    } else if (v_.pixel_type == PixelType::kUInt16) {
      copy<uint16_t>(patch_column, sink, out);
    } else {
      copy<float>(patch_column, sink, out);
    }
  }

 private:
  template <typename Pixel>
  void copy(int32_t patch_column, Sink sink, void* out) const {
    const float scale = v_.scale[b_], shift = v_.shift[b_];
    const Pixel* from = static_cast<const Pixel*>(v_.pixels) + b_ * v_.image_stride +
                        patch_row_ * v_.patch * v_.row_stride + patch_column * v_.patch;
    if (v_.patch == 16) {
      uint8_t* const bytes = static_cast<uint8_t*>(out);
      for (int32_t c = 0; c < v_.channels; ++c, from += v_.channel_stride) {
        convert_rows16(sink, from, v_.row_stride, 16, scale, shift,
                       bytes + c * 256 * token_size(sink.type));
      }
      return;
    }
    Pixel* const cut = reinterpret_cast<Pixel*>(bench_.cut);
    for (int32_t c = 0; c < v_.channels; ++c, from += v_.channel_stride) {
      copy_square(from, v_.row_stride, v_.patch, cut + c * v_.patch * v_.patch, v_.patch);
    }
    convert_to(sink, cut, v_.row_length(), scale, shift, out);
  }

  const Views& v_;
  const Bench& bench_;
  Taps rows_, columns_;
  int64_t b_ = 0;
  int32_t patch_row_ = 0;
  bool whole_ = false;
};

typedef uint8_t SixteenBytes __attribute__((vector_size(16), aligned(1), may_alias));

// What of each patch a mask hides. A mask of one cell a patch and one of one cell a pixel look alike
// from here.
class Cover {
 public:
  enum State : uint8_t { kNone, kSome, kAll };

  Cover(Parts& parts, const Views& views, const bool* mask, int32_t unit)
      : v_(views), mask_(mask), unit_(unit), bytes_(parts.take<uint8_t>(views.row_length() + 16)) {}

  State state(int64_t b, int32_t patch) const {
    if (mask_ == nullptr) return kNone;
    if (unit_ == v_.patch) return flag(mask_, b * v_.patches() + patch) ? kAll : kNone;
    const uint8_t* cells = first(b, patch);
    SixteenBytes some{}, all = some - 1;  // any bit of a cell; the least cell
    uint8_t more = 0, less = 255;
    for (int32_t r = 0; r < v_.patch; ++r, cells += v_.out_w) {
      int32_t j = 0;
      for (; j + 16 <= v_.patch; j += 16) {
        const SixteenBytes here = *reinterpret_cast<const SixteenBytes*>(cells + j);
        some |= here;
        all = here < all ? here : all;
      }
      for (; j < v_.patch; ++j) {
        more |= cells[j];
        less = cells[j] < less ? cells[j] : less;
      }
    }
    for (int i = 0; i < 16; ++i) {
      more |= some[i];
      less = all[i] < less ? all[i] : less;
    }
    return more == 0 ? kNone : less != 0 ? kAll : kSome;
  }

  // Asks for the cells of a row of patches, from the first one's number on.
  void expect(int64_t b, int32_t patch) const {
    if (mask_ == nullptr || unit_ == v_.patch || patch >= v_.patches()) return;
    prefetch(first(b, patch), int64_t{v_.patch} * v_.out_w);
  }

  // Not 0 for every hidden element of the patch, after `ahead` < 4 bytes of 0 and with 4 more behind.
  const uint8_t* elements(int64_t b, int32_t patch, int32_t ahead) const {
    const int32_t area = v_.patch * v_.patch, length = v_.row_length();
    std::memset(bytes_, 0, 4);
    uint8_t* const one = bytes_ + ahead;
    if (unit_ == v_.patch) {
      std::memset(one, flag(mask_, b * v_.patches() + patch), size_t(length));
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
