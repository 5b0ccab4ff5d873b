// The CUDA kernel, thread by thread on the CPU, against the CPU kernel. Run by ctest.
#include "cuda_emulation.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/group_mask.cuh"

using namespace spcxr;

namespace {

void compare(const Law& law) {
  const std::vector<int64_t> ids{0, 12345, kMaxImageId - 1};
  const size_t n_blocks = ids.size() * law.max_blocks * 4, n_cells = ids.size() * law.cells();
  std::vector<int32_t> blocks(n_blocks, -7), expected_blocks(n_blocks);
  std::vector<char> mask(n_cells, 2), expected_mask(n_cells);
  const auto bools = [](std::vector<char>& v) { return reinterpret_cast<bool*>(v.data()); };
  emulated::launch(static_cast<unsigned>(ids.size()), kThreads, [&] {
    group_mask_kernel(ids.data(), 11, 3, law, blocks.data(), bools(mask));
  });
  group_mask_cpu(ids.data(), static_cast<int64_t>(ids.size()), 11, 3, law, expected_blocks.data(),
                 bools(expected_mask));
  if (blocks != expected_blocks || mask != expected_mask) {
    std::fprintf(stderr, "differs at %dx%d, torus %d\n", law.grid_h, law.grid_w, law.torus);
    std::exit(1);
  }
}

}  // namespace

int main() {
  for (int torus = 0; torus < 2; ++torus) {
    compare(make_law(14, 14, 0.5, 0.75, 0, 0, torus));
    compare(make_law(40, 30, 0.2, 0.4, 0, 0, torus));
    compare(make_law(1, 9, 0.5, 0.75, 0, 0, torus));
    compare(make_law(6, 5, 1.0, 1.0, 5, 5, torus));
    compare(make_law(3, 3, 0.0, 0.0, 0, 0, torus));
  }
  std::puts("emulated CUDA: the same bits");
}
