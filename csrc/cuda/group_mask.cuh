// The kernel alone, so that csrc/tests can also run it on the CPU, thread by thread.
#pragma once

#include "core/group_mask.h"

namespace spcxr {

constexpr int kThreads = 128;

// One block of threads an image. The rectangles follow one another, as each depends on what the
// earlier ones covered; the cells of one rectangle are covered in parallel. The mask itself is the
// bitmap, so that a grid of any size fits.
__global__ void __launch_bounds__(kThreads)
group_mask_kernel(const int64_t* __restrict__ image_ids, int64_t seed, int64_t epoch, Law law,
                  int32_t* __restrict__ blocks, bool* __restrict__ mask) {
  __shared__ int32_t covered;
  const int64_t image_id = image_ids[blockIdx.x];
  if (image_id < 0 || image_id >= kMaxImageId) __trap();  // reported as an illegal instruction
  const Stream stream = make_stream(seed, epoch, image_id, kGroupsStream);
  const int32_t target = draw_target(law, stream);
  blocks += int64_t{blockIdx.x} * law.max_blocks * 4;
  mask += int64_t{blockIdx.x} * law.cells();

  for (int64_t i = threadIdx.x; i < law.cells(); i += kThreads) mask[i] = false;
  if (threadIdx.x == 0) covered = 0;
  __syncthreads();

  int32_t listed = 0;
  for (int32_t j = 0; listed + 4 <= law.max_blocks; ++j) {
    const bool done = covered >= target;
    __syncthreads();  // everyone has read `covered` before anyone adds to it
    if (done) break;
    const Rect rect = draw_rect(law, stream, j);  // the same in every thread
    int32_t fresh = 0;
#pragma unroll
    for (int32_t p = 0; p < 4; ++p) {
      const Rect r = piece(law, rect, p);
      for (int32_t i = threadIdx.x; i < r.height * r.width; i += kThreads) {
        bool& cell = mask[int64_t{r.top + i / r.width} * law.grid_w + r.left + i % r.width];
        fresh += !cell;
        cell = true;
      }
      if (threadIdx.x == 0 && r.height > 0) {
        reinterpret_cast<int4*>(blocks)[listed] = make_int4(r.top, r.left, r.height, r.width);
      }
      listed += r.height > 0;
    }
    fresh = __reduce_add_sync(0xFFFFFFFFu, fresh);
    if (threadIdx.x % 32 == 0 && fresh != 0) atomicAdd(&covered, fresh);
    __syncthreads();
  }
  for (int32_t i = listed + threadIdx.x; i < law.max_blocks; i += kThreads) {
    reinterpret_cast<int4*>(blocks)[i] = make_int4(0, 0, 0, 0);
  }
}

}  // namespace spcxr
