// What both attention kernels are made of: who works on what, which keys are visible, rows of a
// head in shared memory, and products of tiles.
//
// A tile has 16 rows. Of a tile in registers, quad l / 4 of a warp holds rows l / 4 and l / 4 + 8,
// its lane l % 4 columns 2 (l % 4) and the next of every eight: see cuda/matrix.cuh.
#pragma once

#include "core/attention.h"
#include "cuda/matrix.cuh"

namespace spcxr {

constexpr int kAttentionThreads = 128;  // at most
constexpr float kLog2E = 1.4426950408889634f;

// Longer sequences are another kernel's: there the passes are no longer bound by memory, or a head
// does not fit. What the shared memory of a device holds is asked at the launch.
constexpr int32_t kForwardTokens = 384, kBackwardTokens = 256;

SPCXR_HD int32_t whole_tiles(int32_t rows) { return (rows + 15) / 16 * 16; }

constexpr int32_t kServedBytes = 32;

// Shared memory and warps of a block: keys and values, and in the backward pass queries, gradients,
// two numbers a query, the places of the keys, and what is served.
SPCXR_HD int32_t forward_bytes(int32_t n_max, int32_t dim) {
  return whole_tiles(n_max) * dim * 2 * 2;
}
SPCXR_HD int32_t backward_bytes(int32_t n_max, int32_t dim) {
  return whole_tiles(n_max) * (dim * 2 * 4 + 2 * 4 + 2) + kServedBytes;
}
inline int32_t forward_warps(int32_t n_max) { return n_max <= 32 ? 1 : n_max <= 64 ? 2 : 4; }
inline int32_t backward_warps(int32_t n_max) { return n_max <= 32 ? 2 : 4; }

// A block of few warps serves one (sequence, head), so that several blocks share a processor. Who
// a thread is is asked anew each time, as registers are dear; that its warp is one is said by a
// shuffle, so that branches need no care for lanes apart.
struct Team {
  __device__ int32_t lane() const { return thread_number() % 32; }
  __device__ int32_t warp() const { return __shfl_sync(kAllLanes, thread_number() / 32, 0); }
  __device__ int32_t warps() const { return static_cast<int32_t>(blockDim.x) / 32; }
};

// The sequence and head of a block. Bad cu_seqlens end the launch.
struct Head {
  int64_t row;  // the first one in `out`
  int32_t b, h, n;

  __device__ explicit Head(const Attention& a)
      : b(static_cast<int32_t>(blockIdx.x / static_cast<uint32_t>(a.heads))),
        h(static_cast<int32_t>(blockIdx.x) - b * a.heads) {
    row = a.first_row(b);
    const int64_t end = a.cu_seqlens == nullptr ? row + a.n_max : a.cu_seqlens[b + 1];
    if (row < 0 || end < row || end - row > a.n_max || end > a.total || (b == 0 && row != 0)) {
      __trap();
    }
    n = static_cast<int32_t>(end - row);
  }
  template <class Token>
  __device__ const Token* tokens(const Attention& a, const void* of, const Strides& strides) const {
    return static_cast<const Token*>(of) + a.first_element(strides, b, h);
  }
  template <class Token>
  __device__ Token* gradient(const Attention& a, void* of, const Strides& strides) const {
    return static_cast<Token*>(of) + a.first_element(strides, here(b), here(h));
  }
};

// The bias of q (0), k (1) or v (2), or null.
template <class Token>
__device__ inline const Token* bias_of(const Attention& a, int which, int32_t h) {
  if (a.bias == nullptr) return nullptr;
  return static_cast<const Token*>(a.bias) + (int64_t{which} * a.heads + h) * a.dim;
}

// Visible keys have slots 0, 1, .. in their order. Lane w of each warp knows word w of the mask.
struct VisibleKeys {
  uint32_t word;          // bits of visible keys
  int32_t before, count;  // visible keys of earlier words, of the sequence

  __device__ VisibleKeys(const Attention& a, const Head& head, int32_t lane) : word(0) {
    const int32_t left = head.n - 32 * lane;
    if (left > 0) {
      const uint32_t masked =
          a.key_bits == nullptr ? 0 : a.key_bits[int64_t{head.b} * a.key_words() + lane];
      word = ~masked & (left >= 32 ? kAllLanes : (1u << left) - 1);
    }
    int32_t sum = __popc(word);
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
      const int32_t earlier = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= static_cast<int32_t>(step)) sum += earlier;
    }
    before = sum - __popc(word);
    count = __shfl_sync(kAllLanes, sum, 31);
  }
  // Of key j, -1 when it is not visible. All lanes of the warp ask.
  __device__ int32_t slot(int32_t j) const {
    const uint32_t bits = __shfl_sync(kAllLanes, word, j / 32);
    const int32_t earlier = __shfl_sync(kAllLanes, before, j / 32);
    if ((bits >> (j % 32) & 1u) == 0) return -1;
    return earlier + __popc(bits & ((1u << (j % 32)) - 1));
  }
};

// Tiles of 16 rows of kDim tokens lie in shared memory in pairs, one of keys and one of values (or
// of queries and of gradients): an address in one is that in the other, kTile away.
template <int kDim>
constexpr int kTile = 16 * kDim * 2;  // bytes

// Rows are in pieces of 16 bytes, which change places with the row's number: the same piece of
// eight rows lies in all 32 banks. Of the first tile of a pair:
template <int kDim>
SPCXR_HD uint32_t place(uint32_t row, uint32_t piece) {
  const uint32_t turn = kDim == 32 ? row / 2 % 4 : row % 8;
  return row / 16 * (2 * kTile<kDim>) + row % 16 * (kDim * 2) + (piece ^ turn) * 16;
}

// Where a lane points for four matrices, 16 rows of two pieces: "down" a piece first, as the left
// factor has them (and, transposed, the right one), or "across" eight rows first, as the right
// factor has its columns. Pieces 2 c and 2 c + 1 lie at this address ^ (32 * c).
template <int kDim>
SPCXR_HD uint32_t down(uint32_t lane) {
  return place<kDim>(lane % 16, lane / 16);
}
template <int kDim>
SPCXR_HD uint32_t across(uint32_t lane) {
  return place<kDim>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

// Rows of a head by threads: visit(row, piece) for all of [0, rows), with whole warps.
template <int kDim, class Visit>
__device__ inline void each_piece(const Team& team, int32_t rows, const Visit& visit) {
  constexpr int pieces = kDim / 8, at_once = 32 / pieces;
  const int32_t lane = team.lane(), step = team.warps() * at_once;
#pragma unroll 2
  for (int32_t first = team.warp() * at_once; first < rows; first += step) {
    visit(first + lane / pieces, lane % pieces);
  }
}

// The visible keys' k and v into the rows of their slots, and zeros up to a whole tile.
// visit(key, piece, slot) sees all of them; the copies are awaited by the caller.
template <class Token, int kDim, class Visit>
__device__ inline void load_keys(const Attention& a, const Head& head, const Team& team,
                                 const VisibleKeys& visible, unsigned char* pairs,
                                 const Visit& visit) {
  const Token* k = head.tokens<Token>(a, a.k, a.k_strides);
  const Token* v = head.tokens<Token>(a, a.v, a.v_strides);
  const uint32_t to = shared_address(pairs);
  each_piece<kDim>(team, head.n, [&](int32_t j, int32_t piece) {
    const int32_t slot = visible.slot(j);
    if (slot >= 0) {
      const uint32_t at = to + place<kDim>(slot, piece);
      copy_async(at, k + j * a.k_strides.token + piece * 8);
      copy_async(at + kTile<kDim>, v + j * a.v_strides.token + piece * 8);
    }
    if (j < head.n) visit(j, piece, slot);
  });
  const int32_t padding = whole_tiles(visible.count) - visible.count;
  each_piece<kDim>(team, padding, [&](int32_t i, int32_t piece) {
    if (i >= padding) return;
    unsigned char* at = pairs + place<kDim>(visible.count + i, piece);
    *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(at + kTile<kDim>) = make_uint4(0, 0, 0, 0);
  });
}

template <class Token>
__device__ inline uint4 add(Token, uint4 tokens, uint4 bias) {
  float x[8], y[8];
  spread(tokens, x, Token{});
  spread(bias, y, Token{});
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] += y[i];
  return make_uint4(pack(Token{}, x[0], x[1]), pack(Token{}, x[2], x[3]),
                    pack(Token{}, x[4], x[5]), pack(Token{}, x[6], x[7]));
}

// Word i of lane t of each quad to word t of lane i.
__device__ inline void transpose_quads(uint32_t (&w)[4], int32_t lane) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      const uint32_t taken =
          __shfl_xor_sync(kAllLanes, upper ? w[i] : w[i + step], static_cast<unsigned>(step));
      if (upper) {
        w[i] = taken;
      } else {
        w[i + step] = taken;
      }
    }
  }
}

// The sum over a quad, in each of its lanes.
__device__ inline float quad_sum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}
__device__ inline float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}

// A tile's rows in registers to where the lane's two rows belong (null: nowhere), 16 bytes a store.
template <class Token, int kDim>
__device__ inline void store_tile(const float (&x)[kDim / 8][4], const float (&factor)[2],
                                  Token* const (&rows)[2], int32_t lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int part = 0; part < kDim / 32; ++part) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto& eight = x[4 * part + i];
        w[i] = pack(Token{}, eight[2 * half] * factor[half], eight[2 * half + 1] * factor[half]);
      }
      transpose_quads(w, lane);
      if (rows[half] == nullptr) continue;
      auto* pieces = reinterpret_cast<uint4*>(rows[half]);
      pieces[4 * part + lane % 4] = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

// kTiles tiles of the left factor from shared memory, the first `offset` past `at`: "down".
template <int kDim, int kTiles>
__device__ inline void load_tiles(uint32_t at, int32_t offset,
                                  uint32_t (&tiles)[kTiles][kDim / 16][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c) {
      load_matrices((at ^ (32 * c)) + tile * (2 * kTile<kDim>) + offset, tiles[tile][c]);
    }
  }
}

// s += left * (the first 8 kEights rows of a tile in shared memory)^T; `at` is "across".
template <class Token, int kDim, int kTiles, int kEights = 2, int kLeft>
__device__ inline void multiply_rows(const uint32_t (&left)[kLeft][kDim / 16][4], uint32_t at,
                                     int32_t offset, float (&s)[kTiles][2][4]) {
#pragma unroll
  for (int c = 0; c < kDim / 16; ++c) {
    uint32_t w[4];
    load_matrices((at ^ (32 * c)) + offset, w);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      multiply_add(Token{}, s[tile][0], left[tile][c], w[0], w[1]);
      if (kEights == 2) multiply_add(Token{}, s[tile][1], left[tile][c], w[2], w[3]);
    }
  }
}

// sum += s * (a tile in shared memory); `at` is "down".
template <class Token, int kDim, int kTiles>
__device__ inline void add_product(const float (&s)[kTiles][2][4], uint32_t at, int32_t offset,
                                   float (&sum)[kTiles][kDim / 8][4]) {
  uint32_t left[kTiles][4];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto& eight = s[tile][i / 2];
      left[tile][i] = pack(Token{}, eight[i % 2 * 2], eight[i % 2 * 2 + 1]);
    }
  }
#pragma unroll
  for (int c = 0; c < kDim / 16; ++c) {
    uint32_t w[4];
    load_matrices_transposed((at ^ (32 * c)) + offset, w);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      multiply_add(Token{}, sum[tile][2 * c], left[tile], w[0], w[1]);
      multiply_add(Token{}, sum[tile][2 * c + 1], left[tile], w[2], w[3]);
    }
  }
}

// Zeros in a row of kDim tokens, by the pieces of its lanes.
template <class Token>
__device__ inline void clear_piece(Token* row, int32_t piece) {
  reinterpret_cast<uint4*>(row)[piece] = make_uint4(0, 0, 0, 0);
}

// Rows of a packed batch past its last sequence, the head's share: clear(row, piece).
template <int kDim, class Clear>
__device__ inline void each_row_past(const Attention& a, const Head& head, const Team& team,
                                     const Clear& clear) {
  if (a.cu_seqlens == nullptr) return;
  const int64_t first = a.cu_seqlens[a.count];
  if (first < 0 || first > a.total) __trap();
  constexpr int pieces = kDim / 8;
  const int32_t thread = team.warp() * 32 + team.lane(), at_once = team.warps() * 32 / pieces;
  for (int64_t row = first + head.b + thread / pieces * a.count; row < a.total;
       row += at_once * a.count) {
    clear(row, thread % pieces);
  }
}

}  // namespace spcxr
