// The kernels of visible_patch_gather: count, scan, list, gather.
#pragma once

#include "cuda/layout.cuh"
#include "cuda/sight.cuh"

namespace spcxr {

constexpr int kListThreads = 128;
constexpr int kVisibleThreads = 256;

// A block an image: its visible patches into cu_seqlens[b + 1].
__global__ void __launch_bounds__(kListThreads)
count_visible_kernel(const bool* mask, int32_t patches, int32_t* cu_seqlens) {
  __shared__ int32_t visible;
  if (threadIdx.x == 0) visible = 0;
  __syncthreads();
  mask += int64_t{blockIdx.x} * patches;
  int32_t mine = 0;
  for (int32_t n = threadIdx.x; n < patches; n += blockDim.x) mine += !flag(mask, n);
  mine = __reduce_add_sync(0xFFFFFFFFu, mine);
  if (threadIdx.x % 32 == 0) atomicAdd(&visible, mine);
  __syncthreads();
  if (threadIdx.x == 0) cu_seqlens[blockIdx.x + 1] = visible;
}

// Of one value a thread: the sum of those of earlier threads; `total` gets that of all.
__device__ inline int32_t sum_before(int32_t value, int32_t (&warp_sums)[32], int32_t& total) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int32_t sum = value;
#pragma unroll
  for (uint32_t step = 1; step < 32; step *= 2) {
    const int32_t earlier = __shfl_up_sync(0xFFFFFFFFu, sum, step);
    if (lane >= step) sum += earlier;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int32_t before = 0;
  total = 0;
  for (uint32_t w = 0; w < warps; ++w) {
    if (w == warp) before = total;
    total += warp_sums[w];
  }
  __syncthreads();  // everyone has read the sums before the next call writes them
  return before + sum - value;
}

// One block: counts to sums, in place.
__global__ void __launch_bounds__(kListThreads)
scan_kernel(int64_t count, int32_t* cu_seqlens) {
  __shared__ int32_t warp_sums[32];
  if (threadIdx.x == 0) cu_seqlens[0] = 0;
  int32_t done = 0;
  for (int64_t start = 0; start < count; start += blockDim.x) {
    const int64_t b = start + threadIdx.x;
    const int32_t value = b < count ? cu_seqlens[b + 1] : 0;
    int32_t total;
    const int32_t before = sum_before(value, warp_sums, total);
    if (b < count) cu_seqlens[b + 1] = done + before + value;
    done += total;
  }
}

// A block an image: the numbers of its visible patches, in order.
__global__ void __launch_bounds__(kListThreads)
list_visible_kernel(const bool* mask, int32_t patches, const int32_t* cu_seqlens, int64_t rows,
                    int32_t* ids) {
  __shared__ int32_t warp_sums[32];
  mask += int64_t{blockIdx.x} * patches;
  int32_t row = cu_seqlens[blockIdx.x];
  for (int32_t start = 0; start < patches; start += blockDim.x) {
    const int32_t n = start + threadIdx.x;
    const bool visible = n < patches && !flag(mask, n);
    int32_t total;
    const int32_t mine = row + sum_before(visible, warp_sums, total);
    if (visible && mine < rows) ids[mine] = n;
    row += total;
  }
}

// The image of packed row `row`, which is below the last of cu_seqlens.
__device__ inline int64_t image_of(const int32_t* cu_seqlens, int64_t count, int64_t row) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (cu_seqlens[middle] <= row ? low : high) = middle;
  }
  return low;
}

// What the two kernels of packed rows read and write.
template <class Token>
struct Packed {
  const int32_t* cu_seqlens;
  int64_t rows;
  Token* tokens;
  int32_t* ids;
};

// Patches whose side is a multiple of eight: a block of threads makes `rows_a_block` rows, a thread
// four lines of eight tokens.
template <class Pixel, class Token, bool kWhole>
__global__ void __launch_bounds__(kVisibleThreads, kWhole ? 5 : 4)
visible_wide_kernel(Views v, Layout layout, int32_t rows_a_block, Packed<Token> out) {
  const int64_t total = out.cu_seqlens[v.count];
  const uint32_t end = rows_a_block * layout.row.by;
  for (uint32_t piece = threadIdx.x; piece < end; piece += blockDim.x) {
    const uint32_t local = layout.row(piece);
    const int64_t row = int64_t{blockIdx.x} * rows_a_block + local;
    if (row >= out.rows) return;
    const bool here = row < total;
    const Spot at = layout.spot(here ? out.ids[row] : 0, piece - local * layout.row.by);
    Token* tokens = out.tokens + row * layout.row_length;
    if (here) {
      const Sight<Pixel, kWhole> sight(v, image_of(out.cu_seqlens, v.count, row));
      if (can_copy(v, sight, layout, at)) {
        copy_lines(v, sight, layout, at, tokens + at.element);
        continue;
      }
#pragma unroll 1
      for (int line = 0; line < kDeep; ++line) {
        const Spot lowered = lower(layout, at, line);
        float x[8] = {};
        see_eight(v, sight, lowered, 0xFF, x);
        store_eight(tokens + lowered.element, x);
      }
    } else {
      if (at.element == 0) out.ids[row] = -1;
      const float zeros[8] = {};
      for (int line = 0; line < kDeep; ++line) {
        store_eight(tokens + lower(layout, at, line).element, zeros);
      }
    }
  }
}

// Any patch: a thread an element.
template <class Token>
__global__ void __launch_bounds__(kVisibleThreads)
visible_narrow_kernel(Views v, Layout layout, int32_t rows_a_block, Packed<Token> out) {
  const int64_t total = out.cu_seqlens[v.count];
  const uint32_t length = layout.row_length, end = rows_a_block * length;
  for (uint32_t index = threadIdx.x; index < end; index += blockDim.x) {
    const uint32_t local = layout.row(index), element = index - local * length;
    const int64_t row = int64_t{blockIdx.x} * rows_a_block + local;
    if (row >= out.rows) return;
    float value = 0;
    if (row < total) {
      const int64_t b = image_of(out.cu_seqlens, v.count, row);
      const Spot at = layout.spot(out.ids[row], element);
      value = view_value(v, b, row_axis(v, b), column_axis(v, b), at.channel, at.row, at.column);
    } else if (element == 0) {
      out.ids[row] = -1;
    }
    store_one(out.tokens + row * length + element, value);
  }
}

}  // namespace spcxr
