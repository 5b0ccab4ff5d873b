// The kernels of masked_patch_gather, so that csrc/tests can also run them thread by thread.
#pragma once

#include "cuda/layout.cuh"
#include "cuda/sight.cuh"

namespace spcxr {

constexpr int kGatherThreads = 256;
constexpr int32_t kStagedBlocks = 256;  // of a shuffled image; a longer list is read where it lies

// The blocks of a shuffled image, without the padding at the end of the list.
struct Stage {
  int4 blocks[kStagedBlocks];
  int2 sources[kStagedBlocks];
  int32_t used;
};

// The list of image b into `stage`, if it fits there. Called by all threads of a block.
__device__ inline void stage_blocks(const Fill& f, int32_t b, Stage& stage) {
  if (threadIdx.x == 0) stage.used = f.n_blocks <= kStagedBlocks ? 0 : f.n_blocks;
  if (f.n_blocks > kStagedBlocks) return __syncthreads();
  __syncthreads();
  for (int32_t k = threadIdx.x; k < f.n_blocks; k += blockDim.x) {
    const int4 block = reinterpret_cast<const int4*>(f.blocks)[int64_t{b} * f.n_blocks + k];
    stage.blocks[k] = block;
    stage.sources[k] = reinterpret_cast<const int2*>(f.sources)[int64_t{b} * f.n_blocks + k];
    if (block.z > 0) atomicMax(&stage.used, k + 1);
  }
  __syncthreads();
}

// Which of eight neighbours block k covers, as bits; and where it reads the first of them.
struct Cover {
  uint32_t bits;
  int32_t row, column;
};

__device__ inline Cover cover(const Fill& f, const Stage& stage, int32_t b, int32_t k, Spot at) {
  const bool staged = f.n_blocks <= kStagedBlocks;
  const int64_t listed = int64_t{b} * f.n_blocks + k;
  const int4 block = staged ? stage.blocks[k] : reinterpret_cast<const int4*>(f.blocks)[listed];
  const int32_t down = at.row - block.x, right = at.column - block.y;
  if (down < 0 || down >= block.z || right <= -8 || right >= block.w) return Cover{0, 0, 0};
  const int32_t first = right < 0 ? -right : 0, end = smaller(8, block.w - right);
  if (first >= end) return Cover{0, 0, 0};
  const int2 source = staged ? stage.sources[k] : reinterpret_cast<const int2*>(f.sources)[listed];
  return Cover{(0xFFu >> (8 - end)) & (0xFFu << first), source.x + down, source.y + right};
}

// The source of a shuffled pixel lies in the view, or the launch ends with an illegal instruction.
__device__ inline void check_source(const Views& v, uint32_t bits, int32_t row, int32_t column) {
  const uint32_t first = column + __ffs(static_cast<int32_t>(bits)) - 1u;  // wraps, so one
  const uint32_t last = column + 31u - __clz(static_cast<int32_t>(bits));  // comparison is enough
  const uint32_t h = v.out_h, w = v.out_w;
  if (static_cast<uint32_t>(row) >= h || first >= w || last >= w) __trap();
}

// The partner that fills image b.
__device__ inline int32_t partner_of(const Views& v, const Fill& f, int32_t b) {
  if (f.partner[b] < 0 || f.partner[b] >= v.count) __trap();
  return static_cast<int32_t>(f.partner[b]);
}

__device__ inline void noise_four(const Fill& f, int32_t b, uint32_t index, float (&x)[4]) {
  const int64_t id = f.image_ids[b];
  if (id < 0 || id >= kMaxImageId) __trap();
  const Stream stream = make_stream(f.seed, f.epoch, id, kNoiseStream | f.view << 8);
  const Words w = stream(index >> 2);
  const Pair low = normal_pair(w.w[0], w.w[1]), high = normal_pair(w.w[2], w.w[3]);
  x[0] = low.first, x[1] = low.second, x[2] = high.first, x[3] = high.second;
}

// Eight neighbours of a patch's row: what is seen of the image itself, then what fills the rest.
template <class Pixel, bool kWhole>
__device__ inline void fill_eight(const Views& v, const Fill& f, int32_t kind,
                                  const Stage& stage, int32_t b, Spot at, uint32_t hidden,
                                  float (&x)[8]) {
  if (hidden != 0 && (kind < kNoise || kind > kShuffle)) __trap();
  uint32_t wanted = ~hidden & 0xFF;  // now, by the loop below
  uint32_t rest = kind == kOther || kind == kShuffle ? hidden : 0;  // later
  int32_t k = kind == kShuffle ? stage.used : 0, image = b;
  Spot from = at;
  for (;;) {
    if (wanted != 0) see_eight(v, Sight<Pixel, kWhole>(v, image), from, wanted, x);
    if (rest == 0) return;
    wanted = 0;
    from = at;
    while (wanted == 0 && --k >= 0) {
      const Cover c = cover(f, stage, b, k, at);
      wanted = c.bits & rest;
      if (wanted == 0) continue;
      check_source(v, wanted, c.row, c.column);
      from.row = c.row;
      from.column = c.column;
    }
    if (wanted == 0) wanted = rest;  // under no block; or all that the partner fills
    if (kind == kOther) image = partner_of(v, f, b);
    rest &= ~wanted;
  }
}

// Which image a block of threads belongs to, and a thread's piece of it.
struct Work {
  int32_t b;
  uint32_t piece;
};

__device__ inline Work work_of(const Divisor& blocks_an_image) {
  const uint32_t b = blocks_an_image(blockIdx.x), slice = blockIdx.x - b * blocks_an_image.by;
  return Work{static_cast<int32_t>(b), slice * blockDim.x + threadIdx.x};
}

template <class Pixel, bool kWhole>
__device__ inline void make_eight(const Views& v, const Fill& f, const Layout& layout,
                                  const Stage& stage, int32_t kind, int32_t b, Spot at,
                                  float (&x)[8]) {
  const uint32_t hidden = hidden_eight(v, f, layout, b, at);
  fill_eight<Pixel, kWhole>(v, f, kind, stage, b, at, hidden, x);
  if (kind != kNoise || hidden == 0) return;
#pragma unroll 1
  for (uint32_t half = 0; half < 8; half += 4) {  // the halves turn through the registers
    float noise[4];
    noise_four(f, b, layout.index(at) + half, noise);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = hidden >> (half + i) & 1 ? noise[i] : x[i];
      x[i] = x[4 + i];
      x[4 + i] = value;
    }
  }
}

// Patches whose side is a multiple of eight: a thread makes four lines of eight tokens. A warp
// stores 128 bytes and more that follow one another: four lines of a ViT/16's patch.
template <class Pixel, class Token, bool kWhole>
__global__ void __launch_bounds__(kGatherThreads, kWhole ? 4 : 3)
gather_wide_kernel(Views v, Fill f, Layout layout, Divisor blocks_an_image, Token* tokens) {
  __shared__ Stage stage;
  const auto [b, piece] = work_of(blocks_an_image);
  const bool inside = piece < layout.pieces;
  const Spot at = layout.spot(inside ? piece : 0);
  const bool by_patch = f.mask == nullptr || f.unit != 1;
  const uint32_t hidden = by_patch ? hidden_eight(v, f, layout, b, at) : 0;
  const int32_t kind = f.mask == nullptr ? kZeros : f.kind[b];
  if (kind == kShuffle) stage_blocks(f, b, stage);
  if (!inside) return;
  tokens += int64_t{b} * layout.patches * layout.row_length;
  if (by_patch && (hidden == 0 || kind == kOther)) {
    const Sight<Pixel, kWhole> sight(v, hidden == 0 ? b : partner_of(v, f, b));
    if (can_copy(v, sight, layout, at)) {
      return copy_lines(v, sight, layout, at, tokens + layout.index(at));
    }
  }
#pragma unroll 1
  for (int line = 0; line < kDeep; ++line) {
    const Spot here = lower(layout, at, line);
    float x[8] = {};
    make_eight<Pixel, kWhole>(v, f, layout, stage, kind, b, here, x);
    store_eight(tokens + layout.index(here), x);
  }
}

__device__ inline float fill_one(const Views& v, const Fill& f, int32_t kind,
                                 const Stage& stage, int32_t b, Spot at) {
  int32_t image = b;
  Place place{at.row, at.column};
  if (is_hidden(v, f, b, at.row, at.column)) {
    if (kind == kZeros || kind == kNoise) return 0;
    if (kind == kOther) image = partner_of(v, f, b);
    for (int32_t k = kind == kShuffle ? stage.used - 1 : -1; k >= 0; --k) {
      const Cover c = cover(f, stage, b, k, at);
      if ((c.bits & 1) == 0) continue;
      check_source(v, 1, c.row, c.column);
      place = Place{c.row, c.column};
      break;
    }
  }
  return view_value(v, image, row_axis(v, image), column_axis(v, image), at.channel, place.row,
                    place.column);
}

// Any patch: a thread makes four elements that follow one another, of one patch or two.
template <class Token>
__global__ void __launch_bounds__(kGatherThreads)
gather_narrow_kernel(Views v, Fill f, Layout layout, Divisor blocks_an_image, Token* tokens) {
  __shared__ Stage stage;
  const auto [b, four] = work_of(blocks_an_image);
  const int32_t kind = f.mask == nullptr ? kZeros : f.kind[b];
  if (kind < kNoise || kind > kShuffle) __trap();
  if (kind == kShuffle) stage_blocks(f, b, stage);
  const uint32_t index = four * 4;
  if (index >= layout.pieces) return;
  tokens += int64_t{b} * layout.pieces + index;
  const int32_t count = smaller(4, layout.pieces - index);
  float x[4] = {};
  bool noisy = false;
#pragma unroll 1
  for (int32_t i = 0; i < 4; ++i) {  // the four turn through the registers
    float value = 0;
    if (i < count) {
      const Spot at = layout.spot(index + i);
      noisy |= kind == kNoise && is_hidden(v, f, b, at.row, at.column);
      value = fill_one(v, f, kind, stage, b, at);
    }
#pragma unroll
    for (int j = 0; j < 3; ++j) x[j] = x[j + 1];
    x[3] = value;
  }
  if (noisy) {
    float noise[4];
    noise_four(f, b, index, noise);
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      if (i >= count) continue;
      const Spot at = layout.spot(index + i);
      if (is_hidden(v, f, b, at.row, at.column)) x[i] = noise[i];
    }
  }
  if (count == 4) {
    store_four(tokens, x);
  } else {
    for (int32_t i = 0; i < count; ++i) {
      store_one(tokens + i, i == 0 ? x[0] : i == 1 ? x[1] : x[2]);
    }
  }
}

}  // namespace spcxr
