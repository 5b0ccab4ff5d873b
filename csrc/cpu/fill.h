// What stands where a patch is hidden. Internal to kernels_body.h.
#pragma once

#include "cpu/noise.h"
#include "cpu/patches.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

inline void merge_to(TokenType type, const float* values, const uint8_t* hidden, int32_t n,
                     void* tokens) {
  with_type(type, tokens,
            [&](auto token, auto* out) { merge<decltype(token)>(values, hidden, n, out); });
}

// Noise where a patch is hidden; blocks of the stream that nothing hidden needs are not computed.
class Noise {
 public:
  Noise(Parts& parts, const Views& views)
      : length_(views.row_length()),
        blocks_(parts.take<uint32_t>(length_ / 4 + 20)),
        places_(parts.take<int32_t>(length_ / 4 + 20)),
        packed_(parts.take<float>(length_ + 4 * 20)),
        values_(parts.take<float>(length_ + 8)) {}

  static int32_t ahead(uint32_t patch, uint32_t length) {
    return static_cast<int32_t>(patch * length & 3);
  }

  // Of element e at [ahead + e], where `hidden` (as Cover::elements gives it) is not 0.
  const float* operator()(const Stream& stream, int32_t patch, const uint8_t* hidden, bool all) {
    const uint32_t index = static_cast<uint32_t>(patch) * static_cast<uint32_t>(length_);
    const int32_t quads = (ahead(patch, length_) + length_ + 3) / 4;
    int32_t listed = 0;
    if (all) {
      for (; listed < quads; ++listed) blocks_[listed] = (index >> 2) + listed;
    } else {
      for (int32_t q = 0; q < quads; ++q) {
        uint32_t four;
        std::memcpy(&four, hidden + q * 4, 4);
        blocks_[listed] = (index >> 2) + q;
        places_[listed] = q;
        listed += four != 0;
      }
    }
    for (int32_t i = listed; i % 16 != 0; ++i) blocks_[i] = 0;
    normal_quads(stream, blocks_, listed, packed_);
    if (all) return packed_;
    for (int32_t i = 0; i < listed; ++i) {
      std::memcpy(values_ + places_[i] * 4, packed_ + i * 4, 4 * sizeof(float));
    }
    return values_;
  }

 private:
  int32_t length_;
  uint32_t* blocks_;
  int32_t* places_;
  float* packed_;
  float* values_;
};

// One image's view as planes, and the same with the blocks of kShuffle painted over one another.
class Shuffle {
 public:
  Shuffle(Parts& parts, const Views& views, bool needed)
      : v_(views),
        plane_(int64_t{views.out_h} * views.out_w),
        clean_(parts.take<float>(needed ? plane_ * views.channels : 0)),
        painted_(parts.take<float>(needed ? plane_ * views.channels : 0)) {}

  void keep(int32_t patch, const float* strip) {
    const int32_t p = v_.patch;
    for (int32_t c = 0; c < v_.channels; ++c, strip += p * p) {
      copy_square(strip, p, p, clean_ + at(c, patch), v_.out_w);
    }
  }

  void paint(const Fill& f, int64_t b) {
    std::memcpy(painted_, clean_, size_t(plane_) * v_.channels * sizeof(float));
    for (int64_t k = b * f.n_blocks; k < (b + 1) * f.n_blocks; ++k) {
      const int32_t* const block = f.blocks + k * 4;
      const int32_t* const source = f.sources + k * 2;
      for (int32_t c = 0; c < v_.channels; ++c)
        for (int32_t r = 0; r < block[2]; ++r) {
          const int64_t to = c * plane_ + int64_t{block[0] + r} * v_.out_w + block[1];
          const int64_t from = c * plane_ + int64_t{source[0] + r} * v_.out_w + source[1];
          std::memcpy(painted_ + to, clean_ + from, size_t(block[3]) * sizeof(float));
        }
    }
  }

  void take(int32_t patch, float* strip) const {
    const int32_t p = v_.patch;
    for (int32_t c = 0; c < v_.channels; ++c, strip += p * p) {
      copy_square(painted_ + at(c, patch), v_.out_w, p, strip, p);
    }
  }

 private:
  int64_t at(int32_t c, int32_t patch) const {
    const int64_t row = int64_t{patch / v_.grid_w()} * v_.patch;
    return c * plane_ + row * v_.out_w + patch % v_.grid_w() * v_.patch;
  }

  const Views& v_;
  int64_t plane_;
  float* clean_;
  float* painted_;
};

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
