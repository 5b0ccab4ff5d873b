// Index arithmetic, generator and law, without torch or Python. Run by ctest.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "core/geometry.h"
#include "core/group_mask.h"
#include "core/philox.h"

#define CHECK(held)                                                    \
  do {                                                                 \
    if (!(held)) {                                                     \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #held);  \
      std::exit(1);                                                    \
    }                                                                  \
  } while (0)

using namespace spcxr;

namespace {

void test_philox_known_answers() {  // Random123's kat_vectors, philox4x32 10
  const struct {
    uint32_t counter[4], key[2], words[4];
  } known[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& k : known) {
    const Words c{{k.counter[0], k.counter[1], k.counter[2], k.counter[3]}};
    const Words made = philox4x32(c, k.key[0], k.key[1]);
    for (int i = 0; i < 4; ++i) CHECK(made.w[i] == k.words[i]);
  }
}

void test_pieces() {
  // Every corner and size of a small grid against cells counted one by one.
  constexpr int H = 3, W = 5;
  for (int torus = 0; torus < 2; ++torus)
    for (int top = 0; top < H; ++top)
      for (int left = 0; left < W; ++left)
        for (int h = 1; h <= H; ++h)
          for (int w = 1; w <= W; ++w) {
            int times[H][W] = {};
            for (int p = 0; p < 4; ++p) {
              const Rect r = piece({top, left, h, w}, p, H, W, torus);
              CHECK((r.height == 0) == (r.width == 0));
              if (r.height == 0) continue;
              CHECK(r.top >= 0 && r.left >= 0 && r.height > 0 && r.width > 0);
              CHECK(r.top + r.height <= H && r.left + r.width <= W);
              for (int y = 0; y < r.height; ++y)
                for (int x = 0; x < r.width; ++x) ++times[r.top + y][r.left + x];
            }
            for (int y = 0; y < H; ++y)
              for (int x = 0; x < W; ++x) {
                const bool in_y = torus ? (y - top + H) % H < h : y >= top && y < top + h;
                const bool in_x = torus ? (x - left + W) % W < w : x >= left && x < left + w;
                CHECK(times[y][x] == (in_y && in_x));
              }
          }
}

// The mask is the union of the blocks, pads are zero, the target is met with the last rectangle.
void check_groups(const Law& law, int64_t image_id) {
  CHECK(refuse(law) == nullptr);
  const int64_t cells = law.cells();
  // One extra of each, poisoned: the op must write all of its own and nothing beyond.
  std::vector<int32_t> blocks((law.max_blocks + 1) * 4, -7);
  std::vector<char> mask(cells + 1, 2);
  group_mask_cpu(&image_id, 1, 11, 3, law, blocks.data(), reinterpret_cast<bool*>(mask.data()));
  CHECK(blocks[law.max_blocks * 4] == -7 && mask[cells] == 2);
  std::vector<char> painted(cells, 0);
  bool padding = false;
  for (int b = 0; b < law.max_blocks; ++b) {
    const int32_t* r = &blocks[b * 4];
    padding = padding || r[2] == 0;
    if (padding) {
      CHECK(r[0] == 0 && r[1] == 0 && r[2] == 0 && r[3] == 0);
      continue;
    }
    CHECK(r[0] >= 0 && r[1] >= 0 && r[2] >= 1 && r[3] >= 1);
    CHECK(r[0] + r[2] <= law.grid_h && r[1] + r[3] <= law.grid_w);
    for (int y = r[0]; y < r[0] + r[2]; ++y)
      for (int x = r[1]; x < r[1] + r[3]; ++x) painted[int64_t{y} * law.grid_w + x] = 1;
  }
  int64_t covered = 0;
  for (int64_t i = 0; i < cells; ++i) {
    CHECK(mask[i] == painted[i]);
    covered += mask[i];
  }
  const Stream stream = make_stream(11, 3, image_id, kGroupsStream);
  CHECK(covered >= draw_target(law, stream) || blocks[(law.max_blocks - 4) * 4 + 2] != 0);
}

void test_groups() {
  const int grids[][2] = {{14, 14}, {1, 1},   {1, 9},  {9, 1},    {2, 3},   {3, 2},
                          {63, 64}, {65, 64}, {64, 65}, {224, 224}, {5, 300}, {4096, 1}};
  for (const auto& grid : grids)
    for (const double m : {0.0, 0.3, 0.75, 1.0})
      for (int torus = 0; torus < 2; ++torus)
        for (const double longest : {0.0, 1.0, 4096.0}) {
          const Law law = make_law(grid[0], grid[1], m < 0.5 ? m : 0.5, m, longest > 0 ? 1.0 : 0.0,
                                   longest, torus);
          if (law.max_blocks > 1 << 15) continue;  // single pixels of a photograph: refused
          for (const int64_t id : {int64_t{0}, int64_t{77}, kMaxImageId - 1}) check_groups(law, id);
        }
}

void test_refuse() {
  Law law = make_law(14, 14, 0.5, 0.75, 0, 0, true);
  CHECK(refuse(law) == nullptr && law.max_blocks == 184);
  law.grid_w = 0;
  CHECK(refuse(law) != nullptr);
  law.grid_w = kMaxSide + 1;
  CHECK(refuse(law) != nullptr);
  CHECK(refuse(make_law(224, 224, 0.5, 0.75, 1, 1, true)) != nullptr);  // too many blocks
  CHECK(refuse(make_law(8, 8, 0.5, 2.0, 0, 0, true)) != nullptr);       // more than all cells
}

}  // namespace

int main() {
  test_philox_known_answers();
  test_pieces();
  test_groups();
  test_refuse();
  std::puts("core: ok");
}
