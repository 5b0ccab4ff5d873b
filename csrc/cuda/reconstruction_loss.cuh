// The kernels of masked_reconstruction_loss: count what is hidden, the images' losses, their sum.
// No sum depends on the order in which threads run.
#pragma once

#include "core/patch_gather.h"
#include "cuda/layout.cuh"
#include "cuda/sight.cuh"

namespace spcxr {

constexpr int kCountThreads = 256;
constexpr int kLossThreads = 256;

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
  template <class Token>
  static __device__ void store(Token* at, const float (&x)[8]) {
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
  template <class Token>
  static __device__ void store(Token* at, const float (&x)[1]) {
    store_one(at, x[0]);
  }
};

template <class Token>
struct LossCall {
  Fill hidden;  // mask and unit alone
  LossLaw law;
  int32_t lanes;  // that share a patch: a power of two up to 32
  const Token* predicted;
  Token* gradient;
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

// The loss of the elements at `at`, and their gradient.
template <class Look, class Token>
__device__ inline float loss_of(const Views& v, const LossCall<Token>& call, const Look& look,
                                int64_t b, Spot at, uint32_t hidden, Norm norm, float weight,
                                int64_t offset) {
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
      slope[i] = loss_slope(call.law.distance, error) * weight;
    }
  }
  if (call.gradient != nullptr) Look::store(call.gradient + offset, slope);
  return sum;
}

// A block an image; `lanes` threads a patch.
template <class Look, class Token>
__global__ void __launch_bounds__(kLossThreads, Look::kWhole ? 4 : 3)
loss_kernel(Views v, Layout layout, LossCall<Token> call) {
  __shared__ double warp_sums[32];
  const int64_t b = blockIdx.x;
  double count = 0;
  for (int64_t i = threadIdx.x; i < v.count; i += blockDim.x) count += call.counts[i];
  count = block_sum(count, warp_sums);  // whole numbers: exact
  const double weight = count > 0 ? 1 / count : 0;

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
                     static_cast<float>(weight), offset);
    }
  }
  sum = block_sum(sum, warp_sums);
  if (threadIdx.x == 0) call.sums[b] = sum * weight;
}

// One block: the images' losses added up.
__global__ void __launch_bounds__(kCountThreads)
sum_losses_kernel(const double* sums, int64_t count, float* loss) {
  __shared__ double warp_sums[32];
  double mine = 0;
  for (int64_t b = threadIdx.x; b < count; b += blockDim.x) mine += sums[b];
  const double sum = block_sum(mine, warp_sums);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum);
}

}  // namespace spcxr
