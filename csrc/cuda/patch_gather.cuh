// The kernels of masked_patch_gather, so that csrc/tests can also run them thread by thread.
#pragma once

#include "cuda/layout.cuh"
#include "cuda/sight.cuh"

namespace spcxr {

constexpr int kGatherThreads = 256;
constexpr int32_t kStagedBlocks = 256;  // of a shuffled image; a longer list is read where it lies

// The list of a shuffled image's blocks, without the padding at its end.
struct Shuffle {
  const int4* blocks;
  const int2* sources;
  int32_t n_blocks;
};

struct ShuffleStage {
  int4 blocks[kStagedBlocks];
  int2 sources[kStagedBlocks];
  int32_t used;
};

// Called by all threads of a block, for the same image.
__device__ inline Shuffle stage(const Fill& f, int64_t b, ShuffleStage& stage) {
  const int4* blocks = reinterpret_cast<const int4*>(f.blocks) + b * f.n_blocks;
  const int2* sources = reinterpret_cast<const int2*>(f.sources) + b * f.n_blocks;
  if (f.n_blocks > kStagedBlocks) return Shuffle{blocks, sources, f.n_blocks};
  if (threadIdx.x == 0) stage.used = 0;
  __syncthreads();
  for (int32_t k = threadIdx.x; k < f.n_blocks; k += blockDim.x) {
    stage.blocks[k] = blocks[k];
    stage.sources[k] = sources[k];
    if (blocks[k].z > 0) atomicMax(&stage.used, k + 1);
  }
  __syncthreads();
  return Shuffle{stage.blocks, stage.sources, stage.used};
}

// Which of eight neighbours block k covers, as bits; and where it reads the first of them.
struct Cover {
  uint32_t bits;
  int32_t row, column;
};

__device__ inline Cover cover(const Shuffle& s, int32_t k, Spot at) {
  const int4 block = s.blocks[k];
  const int32_t down = at.row - block.x, right = at.column - block.y;
  if (down < 0 || down >= block.z || right <= -8 || right >= block.w) return Cover{0, 0, 0};
  const int32_t first = right < 0 ? -right : 0, end = smaller(8, block.w - right);
  if (first >= end) return Cover{0, 0, 0};
  const int2 source = s.sources[k];
  return Cover{(0xFFu >> (8 - end)) & (0xFFu << first), source.x + down, source.y + right};
}

// The source of a shuffled pixel lies in the view, or the launch ends with an illegal instruction.
__device__ inline void check_source(const Views& v, uint32_t bits, int32_t row, int32_t column) {
  const uint32_t first = column + __ffs(static_cast<int32_t>(bits)) - 1u;  // wraps, so one
  const uint32_t last = column + 31u - __clz(static_cast<int32_t>(bits));  // comparison is enough
  const uint32_t h = v.out_h, w = v.out_w;
  if (static_cast<uint32_t>(row) >= h || first >= w || last >= w) __trap();
}

// What fills an image, checked: the stream of its noise, its partner.
struct Filling {
  int32_t kind;
  int64_t partner;
  Stream noise;
};

__device__ inline Filling make_filling(const Views& v, const Fill& f, int64_t b) {
  Filling filling{kZeros, b, Stream{}};
  if (f.mask == nullptr) return filling;
  filling.kind = f.kind[b];
  if (filling.kind == kNoise) {
    const int64_t id = f.image_ids[b];
    if (id < 0 || id >= kMaxImageId) __trap();
    filling.noise = make_stream(f.seed, f.epoch, id, kNoiseStream | f.view << 8);
  } else if (filling.kind == kOther) {
    filling.partner = f.partner[b];
    if (filling.partner < 0 || filling.partner >= v.count) __trap();
  } else if (filling.kind != kZeros && filling.kind != kShuffle) {
    __trap();
  }
  return filling;
}

__device__ inline void noise_four(const Stream& stream, uint32_t index, float (&x)[4]) {
  const Words w = stream(index >> 2);
  const Pair a = normal_pair(w.w[0], w.w[1]), b = normal_pair(w.w[2], w.w[3]);
  x[0] = a.first, x[1] = a.second, x[2] = b.first, x[3] = b.second;
}

// Eight neighbours of a patch's row: what is seen of the image itself, then what fills the rest.
template <class Pixel>
__device__ inline void fill_eight(const Views& v, const Filling& filling, const Shuffle& shuffle,
                                  int64_t b, Spot at, uint32_t hidden, float (&x)[8]) {
  uint32_t wanted = ~hidden & 0xFF;  // now, by the loop below
  uint32_t rest = filling.kind == kOther || filling.kind == kShuffle ? hidden : 0;  // later
  int32_t k = filling.kind == kShuffle ? shuffle.n_blocks : 0;
  int64_t image = b;
  Spot from = at;
  for (;;) {
    if (wanted != 0) see_eight(v, Sight<Pixel>(v, image), from, wanted, x);
    if (rest == 0) return;
    wanted = 0;
    from = at;
    while (wanted == 0 && --k >= 0) {
      const Cover c = cover(shuffle, k, at);
      wanted = c.bits & rest;
      if (wanted == 0) continue;
      check_source(v, wanted, c.row, c.column);
      from.row = c.row;
      from.column = c.column;
    }
    if (wanted == 0) wanted = rest;  // under no block; or all that the partner fills
    image = filling.partner;
    rest &= ~wanted;
  }
}

// Patches whose side is a multiple of eight. Blocks of threads `blocks_an_image` at a time belong
// to one image; a thread makes eight tokens, and a warp 256 that follow one another.
template <class Pixel, class Token>
__global__ void __launch_bounds__(kGatherThreads, 4)
gather_wide_kernel(Views v, Fill f, Layout layout, int32_t blocks_an_image, Token* tokens) {
  __shared__ ShuffleStage staged;
  const int64_t b = blockIdx.x / blocks_an_image;
  const int32_t slice = blockIdx.x % blocks_an_image;
  const Filling filling = make_filling(v, f, b);
  Shuffle shuffle{nullptr, nullptr, 0};
  if (filling.kind == kShuffle) shuffle = stage(f, b, staged);

  const uint32_t index = (slice * blockDim.x + threadIdx.x) * 8;
  const uint32_t elements = v.patches() * layout.row_length.by;
  if (index >= elements) return;
  const Spot at = layout.spot(index);
  const uint32_t hidden = hidden_eight(v, f.mask, f.unit, b, at);
  float x[8] = {};
  fill_eight<Pixel>(v, filling, shuffle, b, at, hidden, x);
  if (filling.kind == kNoise && hidden != 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float noise[4];
      noise_four(filling.noise, index + 4 * half, noise);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (hidden >> (4 * half + i) & 1) x[4 * half + i] = noise[i];
      }
    }
  }
  store_eight(tokens + b * elements + index, x);
}

__device__ inline float fill_one(const Views& v, const Fill& f, const Filling& filling,
                                 const Shuffle& shuffle, int64_t b, Spot at) {
  int64_t image = b;
  Place place{at.row, at.column};
  if (is_hidden(v, f, b, at.row, at.column)) {
    if (filling.kind == kZeros || filling.kind == kNoise) return 0;
    image = filling.partner;
    for (int32_t k = shuffle.n_blocks - 1; k >= 0; --k) {
      const Cover c = cover(shuffle, k, at);
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
gather_narrow_kernel(Views v, Fill f, Layout layout, int32_t blocks_an_image, Token* tokens) {
  __shared__ ShuffleStage staged;
  const int64_t b = blockIdx.x / blocks_an_image;
  const int32_t slice = blockIdx.x % blocks_an_image;
  const Filling filling = make_filling(v, f, b);
  Shuffle shuffle{nullptr, nullptr, 0};
  if (filling.kind == kShuffle) shuffle = stage(f, b, staged);

  const uint32_t index = (slice * blockDim.x + threadIdx.x) * 4;
  const uint32_t elements = v.patches() * layout.row_length.by;
  if (index >= elements) return;
  tokens += b * elements + index;
  const int32_t count = smaller(4, elements - index);
  float x[4] = {};
  bool noisy = false;
#pragma unroll 1
  for (int32_t i = 0; i < 4; ++i) {  // the four turn through the registers
    float value = 0;
    if (i < count) {
      const Spot at = layout.spot(index + i);
      noisy |= filling.kind == kNoise && is_hidden(v, f, b, at.row, at.column);
      value = fill_one(v, f, filling, shuffle, b, at);
    }
#pragma unroll
    for (int j = 0; j < 3; ++j) x[j] = x[j + 1];
    x[3] = value;
  }
  if (noisy) {
    float noise[4];
    noise_four(filling.noise, index, noise);
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
