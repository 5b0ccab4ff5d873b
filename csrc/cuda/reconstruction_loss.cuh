// The kernels of masked_reconstruction_loss: count what is hidden, the images' losses, their mean;
// and the gradient, slopes times a number. No sum depends on the order in which threads run.
#pragma once

#include "core/patch_gather.h"
#include "cuda/layout.cuh"
#include "cuda/sight.cuh"

namespace spcxr {

constexpr int kCountThreads = 256;
constexpr int kLossThreads = 256;
constexpr int kGradientThreads = 256;

// The sum over the threads of a block, in every thread; always the same order.
__device__ inline double block_sum(double value, double (&warp_sums)[32]) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  __syncthreads();  // everyone has read the sums of the call before
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (uint32_t w = 0; w < blockDim.x / 32; ++w) sum += warp_sums[w];
  return sum;
}

// A block an image: its hidden elements, `weight` for a cell.
__global__ void __launch_bounds__(kCountThreads)
count_hidden_kernel(const bool* mask, int64_t cells, double weight, double* counts) {
  __shared__ double warp_sums[32];
  int32_t mine = 0;
  if (mask != nullptr) {
    mask += int64_t{blockIdx.x} * cells;
    const int64_t words = aligned(mask, 16) ? cells / 16 : 0;
    for (int64_t i = threadIdx.x; i < words; i += blockDim.x) {
      const uint4 w = reinterpret_cast<const uint4*>(mask)[i];
      uint32_t set = set_bytes(w.x);  // a bit a byte: four words share one
      set = set >> 1 | set_bytes(w.y);
      set = set >> 1 | set_bytes(w.z);
      set = set >> 1 | set_bytes(w.w);
      mine += __popc(set);
    }
    for (int64_t i = words * 16 + threadIdx.x; i < cells; i += blockDim.x) mine += flag(mask, i);
  }
  const double sum = block_sum(mine, warp_sums);
  if (threadIdx.x == 0) counts[blockIdx.x] = sum * weight;
}

// How a thread looks at a patch: eight neighbours at once, or one element.
template <class Pixel, bool whole>
struct Eight {
  static constexpr int kWidth = 8;
  static constexpr bool kWhole = whole;
  Sight<Pixel, kWhole> sight;

  __device__ Eight(const Views& v, int64_t b) : sight(v, b) {}
  __device__ uint32_t hidden(const Views& v, const Fill& f, const Layout& layout, int32_t b,
                             Spot at) const {
    return hidden_eight(v, f, layout, b, at);
  }
  __device__ void see(const Views& v, int64_t, Spot at, uint32_t wanted, float (&x)[8]) const {
    see_eight(v, sight, at, wanted, x);
  }
  template <class Token>
  static __device__ void load(const Token* at, float (&x)[8]) {
    load_eight(at, x);
  }
  template <class Kept>
  static __device__ void store(Kept* at, const float (&x)[8]) {
    store_eight(at, x);
  }
};

struct One {
  static constexpr int kWidth = 1;
  static constexpr bool kWhole = false;
  Axis rows, columns;

  __device__ One(const Views& v, int64_t b) : rows(row_axis(v, b)), columns(column_axis(v, b)) {}
  __device__ uint32_t hidden(const Views& v, const Fill& f, const Layout&, int32_t b,
                             Spot at) const {
    return is_hidden(v, f, b, at.row, at.column);
  }
  __device__ void see(const Views& v, int64_t b, Spot at, uint32_t, float (&x)[1]) const {
    x[0] = view_value(v, b, rows, columns, at.channel, at.row, at.column);
  }
  template <class Token>
  static __device__ void load(const Token* at, float (&x)[1]) {
    x[0] = unpack(*at);
  }
  template <class Kept>
  static __device__ void store(Kept* at, const float (&x)[1]) {
    store_one(at, x[0]);
  }
};

template <class Token>
struct LossCall {
  Fill hidden;  // mask and unit alone
  LossLaw law;
  int32_t lanes;  // that share a patch: a power of two up to 32
  const Token* predicted;
  void* slope;  // int8_t or float, see patch_gather.h
  double *sums, *counts;
};

// target = (pixel - mean) * slope.
struct Norm {
  float mean, slope;
};

// Over the lanes of a patch; all lanes of the warp come here.
template <class Look>
__device__ inline Norm patch_norm(const Views& v, const Layout& layout, const Look& look, int64_t b,
                                  int32_t patch, int32_t lanes, bool wanted) {
  const uint32_t length = layout.row_length, lane = threadIdx.x & (lanes - 1);
  double sum = 0, squares = 0;
  for (uint32_t piece = lane; wanted && piece < layout.row.by; piece += lanes) {
    float x[Look::kWidth];
    look.see(v, b, layout.spot(patch, piece), 0xFF, x);
#pragma unroll
    for (const float value : x) {
      sum += value;
      squares += static_cast<double>(value) * value;
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    squares += __shfl_xor_sync(0xFFFFFFFFu, squares, step);
  }
  const double mean = sum / length;
  const double variance = (squares - sum * mean) / (static_cast<double>(length) - 1);
  return Norm{static_cast<float>(mean),
              static_cast<float>(1 / sqrt((variance < 0 ? 0 : variance) + kPatchVarianceFloor))};
}

// The loss of the elements at `at`, and their slopes.
template <class Look, class Token>
__device__ inline float loss_of(const Views& v, const LossCall<Token>& call, const Look& look,
                                int64_t b, Spot at, uint32_t hidden, Norm norm, int64_t offset) {
  constexpr int width = Look::kWidth;
  float slope[width] = {}, sum = 0;
  if (hidden != 0) {
    float target[width] = {}, predicted[width];
    look.see(v, b, at, hidden, target);
    Look::load(call.predicted + offset, predicted);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      if ((hidden >> i & 1) == 0) continue;
      const float error = predicted[i] - (target[i] - norm.mean) * norm.slope;
      sum += loss_value(call.law.distance, error);
      slope[i] = loss_slope(call.law.distance, error);
    }
  }
  if (call.slope == nullptr) return sum;
  if (call.law.distance == Distance::kL1) {
    Look::store(static_cast<int8_t*>(call.slope) + offset, slope);
  } else {
    Look::store(static_cast<float*>(call.slope) + offset, slope);
  }
  return sum;
}

// A block an image; `lanes` threads a patch.
template <class Look, class Token>
__global__ void __launch_bounds__(kLossThreads, Look::kWhole ? 4 : 3)
loss_kernel(Views v, Layout layout, LossCall<Token> call) {
  __shared__ double warp_sums[32];
  const int64_t b = blockIdx.x;
  const Look look(v, b);
  const int32_t patches = layout.patches, lanes = call.lanes;
  const int32_t lane = threadIdx.x & (lanes - 1), a_warp = 32 / lanes;
  const int32_t in_warp = (threadIdx.x & 31) / lanes;
  double sum = 0;
  for (int32_t first = threadIdx.x / 32 * a_warp; first < patches;
       first += blockDim.x / 32 * a_warp) {  // the same for a warp, as its lanes exchange sums
    const int32_t patch = first + in_warp;
    const bool here = patch < patches;
    Norm norm{0, 1};
    if (call.law.normalise_patches) {
      norm = patch_norm(v, layout, look, b, patch, lanes, here);
    }
    for (uint32_t piece = lane; here && piece < layout.row.by; piece += lanes) {
      const Spot at = layout.spot(patch, piece);
      const int64_t offset = (b * patches + patch) * layout.row_length + at.element;
      sum += loss_of(v, call, look, b, at, look.hidden(v, call.hidden, layout, b, at), norm,
                     offset);
    }
  }
  sum = block_sum(sum, warp_sums);
  if (threadIdx.x == 0) call.sums[b] = sum;
}

// One block: the mean of all images, and the weight of a slope in its gradient.
__global__ void __launch_bounds__(kCountThreads)
mean_loss_kernel(const double* sums, const double* counts, int64_t images, double slope_weight,
                 float* loss, float* weight) {
  __shared__ double warp_sums[32];
  double distance = 0, hidden = 0;
  for (int64_t b = threadIdx.x; b < images; b += blockDim.x) {
    distance += sums[b];
    hidden += counts[b];
  }
  distance = block_sum(distance, warp_sums);
  hidden = block_sum(hidden, warp_sums);  // whole numbers: exact
  if (threadIdx.x != 0) return;
  const double share = 1 / (hidden > 1 ? hidden : 1);
  *loss = static_cast<float>(distance * share);
  *weight = static_cast<float>(slope_weight * share);
}

// gradient = slope * factor. Eight elements a thread; one by one at the end, and where their places
// do not allow it.
template <class Kept, class Token>
__global__ void __launch_bounds__(kGradientThreads)
gradient_kernel(const Kept* slope, const float* factor, int64_t count, bool wide,
                Token* gradient) {
  const int64_t first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * 8;
  const float times = *factor;
  if (wide && first + 8 <= count) {
    float x[8];
    load_eight(slope + first, x);
#pragma unroll
    for (float& value : x) value *= times;
    store_eight(gradient + first, x);
    return;
  }
  for (int64_t i = first; i < count && i < first + 8; ++i) {
    store_one(gradient + i, unpack(slope[i]) * times);
  }
}

}  // namespace spcxr
