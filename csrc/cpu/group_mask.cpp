#include "core/group_mask.h"

#include <cmath>
#include <cstring>
#include <vector>

namespace spcxr {
namespace {

constexpr int32_t kMaxBlocks = 1 << 15;

int32_t count_ones(uint64_t x) {  // in registers: plain x86-64 has no popcnt instruction
  x -= (x >> 1) & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
  x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0Fu;
  return static_cast<int32_t>((x * 0x0101010101010101u) >> 56);
}

// Bits [first, last) of a word, 0 <= first < last <= 64.
uint64_t ones(int32_t first, int32_t last) {
  return (~uint64_t{0} << first) & (~uint64_t{0} >> (64 - last));
}

// The eight bits of a byte as eight bytes of 0 and 1, lowest first.
struct Spread {
  bool bytes[256][8];
  constexpr Spread() : bytes() {
    for (int value = 0; value < 256; ++value)
      for (int bit = 0; bit < 8; ++bit) bytes[value][bit] = (value >> bit) & 1;
  }
};
constexpr Spread kSpread;

// One bit a cell, rows padded to whole words.
class Bitmap {
 public:
  Bitmap(int32_t height, int32_t width)
      : width_(width), row_words_((width + 63) / 64), bits_(size_t(height) * row_words_) {}

  void clear() { std::memset(bits_.data(), 0, bits_.size() * sizeof(uint64_t)); }

  // Sets a rectangle; returns how many of its cells were not set before.
  int32_t cover(const Rect& r) {
    int32_t fresh = 0;
    const int32_t right = r.left + r.width;
    for (int32_t word = r.left / 64; word * 64 < right; ++word) {
      const int32_t first = r.left > word * 64 ? r.left - word * 64 : 0;
      const uint64_t wanted = ones(first, smaller(right - word * 64, 64));
      uint64_t* column = &bits_[size_t(r.top) * row_words_ + word];
      for (int32_t i = 0; i < r.height; ++i, column += row_words_) {
        const uint64_t added = wanted & ~*column;
        if (added != 0) fresh += count_ones(added);
        *column |= wanted;
      }
    }
    return fresh;
  }

  // Row-major bytes of 0 and 1.
  void spread(bool* mask) const {
    const int64_t height = static_cast<int64_t>(bits_.size()) / row_words_;
    for (int64_t row = 0; row < height; ++row, mask += width_) {
      const uint64_t* words = &bits_[row * row_words_];
      for (int32_t column = 0; column < width_; column += 8) {
        const bool* eight = kSpread.bytes[(words[column / 64] >> (column % 64)) & 0xFF];
        std::memcpy(mask + column, eight, size_t(smaller(width_ - column, 8)));
      }
    }
  }

 private:
  int32_t width_, row_words_;
  std::vector<uint64_t> bits_;
};

uint32_t fixed(double value, double one) { return static_cast<uint32_t>(value * one + 0.5); }

}  // namespace

const char* refuse(const Law& law) {
  if (law.grid_h < 1 || law.grid_w < 1 || law.grid_h > kMaxSide || law.grid_w > kMaxSide) {
    return "group_mask: the grid's sides must be 1 to 4096 units";
  }
  if (int64_t{law.target_low} + law.target_span > law.cells() * 128) {
    return "group_mask: the target must be 0 to all of the grid's cells";
  }
  if (law.height_low < 65536 || law.width_low < 65536 ||
      int64_t{law.height_low} + law.height_span > (int64_t{kMaxSide} << 16) ||
      int64_t{law.width_low} + law.width_span > (int64_t{kMaxSide} << 16)) {
    return "group_mask: block sides must be 1 to 4096 units";
  }
  if (law.max_blocks < 4 || law.max_blocks > kMaxBlocks) {
    return "group_mask: these blocks are too small for the grid; give larger ones";
  }
  return nullptr;
}

Law make_law(int32_t grid_h, int32_t grid_w, double ratio_low, double ratio_high, double block_low,
             double block_high, bool torus) {
  Law law{};
  law.grid_h = grid_h;
  law.grid_w = grid_w;
  law.torus = torus;
  const double cells = static_cast<double>(law.cells());
  law.target_low = fixed(ratio_low * cells, 128);
  law.target_span = fixed(ratio_high * cells, 128) - law.target_low;
  const auto sides = [&](int32_t side, uint32_t* low, uint32_t* span) {
    const double longest = block_low > 0 ? block_high : std::fmax(1.0, 0.3 * side);
    *low = fixed(std::fmin(block_low > 0 ? block_low : 1.0, side), 65536);
    *span = fixed(std::fmin(longest, side), 65536) - *low;
  };
  sides(grid_h, &law.height_low, &law.height_span);
  sides(grid_w, &law.width_low, &law.width_span);
  // Four times the blocks of mean size that tile the grid, and 64; a multiple of 8.
  const int64_t twice_h = 2 * int64_t{law.height_low} + law.height_span;
  const int64_t twice_w = 2 * int64_t{law.width_low} + law.width_span;
  const int64_t area = twice_h * twice_w;
  const int64_t tiling = ((law.cells() << 34) + area - 1) / area;
  const int64_t blocks = 64 + 4 * tiling;
  law.max_blocks = static_cast<int32_t>(blocks > kMaxBlocks ? kMaxBlocks + 8 : (blocks + 7) / 8 * 8);
  return law;
}

void group_mask_cpu(const int64_t* image_ids, int64_t count, int64_t seed, int64_t epoch,
                    const Law& law, int32_t* blocks, bool* mask) {
  Bitmap bitmap(law.grid_h, law.grid_w);
  for (int64_t b = 0; b < count; ++b, blocks += int64_t{law.max_blocks} * 4, mask += law.cells()) {
    const Stream stream = make_stream(seed, epoch, image_ids[b], kGroupsStream);
    const int32_t target = draw_target(law, stream);
    int32_t covered = 0, listed = 0;
    bitmap.clear();
    for (int32_t j = 0; covered < target && listed + 4 <= law.max_blocks; ++j) {
      const Rect rect = draw_rect(law, stream, j);
      for (int32_t p = 0; p < 4; ++p) {
        const Rect cut = piece(law, rect, p);
        if (cut.height == 0) continue;
        covered += bitmap.cover(cut);
        std::memcpy(blocks + listed++ * 4, &cut, sizeof(Rect));
      }
    }
    std::memset(blocks + listed * 4, 0, size_t(law.max_blocks - listed) * sizeof(Rect));
    bitmap.spread(mask);
  }
}

}  // namespace spcxr
