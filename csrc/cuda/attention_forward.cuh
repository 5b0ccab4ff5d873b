// The forward pass: a block holds the visible keys and values of a (sequence, head) in shared
// memory; its warps take tiles of queries and go through the keys 16 at a time with a running
// softmax.
//
// What the softmax cannot see is left out of the products: k's bias adds the same to all scores of
// a query (it is added to lse alone), and v's bias passes through to the output as it is.
#pragma once

#include "cuda/attention_tiles.cuh"

namespace spcxr {

// Tiles of queries that a warp takes at once: two halve the reads of shared memory.
template <int kDim>
constexpr int kQueryTiles = kDim == 128 ? 1 : 2;
// Exponents of two by which a row's scores may pass what the softmax subtracts before the row is
// rescaled: the powers stay far below the largest of either type.
constexpr float kSlack = 8;

// Tiles of queries under way. `most` is in exponents of two.
template <int kDim, int kTiles>
struct Running {
  float out[kTiles][kDim / 8][4] = {};
  float most[kTiles][2], sum[kTiles][2] = {};  // of a row; sums of the lane's own columns

  __device__ Running() {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) most[i / 2][i % 2] = -INFINITY;
  }
  __device__ void rescale(int tile, int half, float top) {
    const float old_most = most[tile][half];
    most[tile][half] = fmaxf(old_most, top);
    const float factor = power_of_two(old_most - most[tile][half]);
    sum[tile][half] *= factor;
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      out[tile][i][2 * half] *= factor;
      out[tile][i][2 * half + 1] *= factor;
    }
  }
  // Scores to powers of two, whose sums are kept.
  __device__ void soften(float (&s)[kTiles][2][4], float scale) {
    float top[kTiles][2];
    bool rises = false;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto& [low, high] = s[tile];
        top[tile][half] = scale * fmaxf(fmaxf(low[2 * half], low[2 * half + 1]),
                                        fmaxf(high[2 * half], high[2 * half + 1]));
        rises |= top[tile][half] > most[tile][half] + kSlack;
      }
    }
    if (__any_sync(kAllLanes, rises)) {
#pragma unroll
      for (int row = 0; row < 2 * kTiles; ++row) {
        rescale(row / 2, row % 2, quad_max(top[row / 2][row % 2]));
      }
    }
#pragma unroll
    for (int i = 0; i < kTiles * 8; ++i) {
      const int tile = i / 8, half = i / 2 % 2;
      float& value = s[tile][i / 4 % 2][i % 4];
      value = power_of_two(fmaf(value, scale, -most[tile][half]));
      sum[tile][half] += value;
    }
  }
};

// A call as a block sees it.
template <class Token, int kDim>
struct Forward {
  using Queries = uint32_t[kQueryTiles<kDim>][kDim / 16][4];

  const Attention& a;
  const Head& head;
  int32_t lane;
  int32_t visible;
  uint32_t keys, values;  // the first tiles, "across" and "down"
  float scale;            // of scores, to exponents of two; its sign is with the queries
  Token* out;
  float* lse;

  __device__ void load_queries(int32_t first, Queries& q) const {
    const Token* from = head.tokens<Token>(a, a.q, a.q_strides) + lane % 4 * 8;
    const Token* bias = bias_of<Token>(a, 0, head.h);
    const uint32_t flip = a.scale < 0 ? 0x80008000u : 0;
#pragma unroll
    for (int i = 0; i < kQueryTiles<kDim> * 2; ++i) {
      const int32_t row = first + 8 * i + lane / 4;
      uint4 eights[kDim / 32];
#pragma unroll
      for (int part = 0; part < kDim / 32; ++part) {
        eights[part] = make_uint4(0, 0, 0, 0);
        if (row < head.n) eights[part] = load_raw(from + row * a.q_strides.token + 32 * part);
      }
      if (bias != nullptr) {
#pragma unroll
        for (int part = 0; part < kDim / 32; ++part) {
          eights[part] = add(Token{}, eights[part], load_raw(bias + 32 * part + lane % 4 * 8));
        }
      }
#pragma unroll
      for (int part = 0; part < kDim / 32; ++part) {
        const uint4 eight = eights[part];
        uint32_t w[4] = {eight.x ^ flip, eight.y ^ flip, eight.z ^ flip, eight.w ^ flip};
        transpose_quads(w, lane);
#pragma unroll
        for (int k = 0; k < 4; ++k) q[i / 2][2 * part + k / 2][k % 2 * 2 + i % 2] = w[k];
      }
    }
  }

  // The keys from `first` on, 16 of them or, at the end, fewer.
  template <int kTiles>
  __device__ void attend(const Queries& q, int32_t first, Running<kDim, kTiles>& running) const {
    const int32_t left = visible - first;
    const uint32_t pair = first / 16 * (2 * kTile<kDim>);
    float s[kTiles][2][4] = {};
    if (left > 8) {
      multiply_rows<Token, kDim, kTiles>(q, keys + pair, 0, s);
    } else {
      multiply_rows<Token, kDim, kTiles, 1>(q, keys + pair, 0, s);
    }
    if (left < 16) {
#pragma unroll
      for (int i = 0; i < kTiles * 8; ++i) {
        const int32_t column = i / 4 % 2 * 8 + lane % 4 * 2 + i % 2;
        if (column >= left) s[i / 8][i / 4 % 2][i % 4] = -INFINITY;
      }
    }
    running.soften(s, scale);
    add_product<Token, kDim, kTiles>(s, values + pair, kTile<kDim>, running.out);
  }

  // The lane's two columns of every eight of a bias.
  __device__ void bias_columns(const Token* bias, float (&x)[kDim / 8][2]) const {
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      const auto* two = reinterpret_cast<const uint32_t*>(bias + 8 * i) + lane % 4;
      split(__ldg(two), x[i][0], x[i][1], Token{});
    }
  }

  // What k's bias adds to the scores of the lane's rows.
  __device__ void scores_of_bias(const uint32_t (&q)[kDim / 16][4], float (&score)[2]) const {
    const Token* bias = bias_of<Token>(a, 1, head.h);
    if (bias == nullptr) return;
    float k[kDim / 8][2];
    bias_columns(bias, k);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        float x[2];
        split(q[i / 2][i % 2 * 2 + half], x[0], x[1], Token{});
        sum = fmaf(x[0], k[i][0], fmaf(x[1], k[i][1], sum));
      }
      score[half] = quad_sum(sum) * fabsf(a.scale);
    }
  }

  __device__ void write_lse(const uint32_t (&q)[kDim / 16][4], int32_t first,
                            const float (&most)[2], const float (&sum)[2]) const {
    float score[2] = {0, 0};
    scores_of_bias(q, score);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t i = first + 8 * half + lane / 4;
      const float value = (most[half] + log_of_two(sum[half])) * (1 / kLog2E) + score[half];
      if (i < head.n && lane % 4 == 0) {
        lse[head.h * a.total + head.row + i] = visible > 0 ? value : INFINITY;
      }
    }
  }

  // Divided by the sum, with v's bias, and written: out and lse.
  template <int kTiles>
  __device__ void finish(const Queries& q, int32_t first, Running<kDim, kTiles>& running) const {
    const Token* bias = visible > 0 ? bias_of<Token>(a, 2, head.h) : nullptr;
    const int64_t width = int64_t{a.heads} * kDim;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int32_t i = first + 16 * tile + lane / 4;
      const float sum[2] = {quad_sum(running.sum[tile][0]), quad_sum(running.sum[tile][1])};
      if (lse != nullptr) write_lse(q[tile], first + 16 * tile, running.most[tile], sum);
      if (bias != nullptr) {
        float shift[kDim / 8][2];
        bias_columns(bias, shift);
#pragma unroll
        for (int k = 0; k < kDim / 2; ++k) {
          running.out[tile][k / 4][k % 4] += shift[k / 4][k % 2] * sum[k / 2 % 2];
        }
      }
      const float inverse[2] = {visible > 0 ? __fdividef(1, sum[0]) : 0,
                                visible > 0 ? __fdividef(1, sum[1]) : 0};
      Token* to = out + (head.row + i) * width + head.h * kDim;
      Token* const rows[2] = {i < head.n ? to : nullptr, i + 8 < head.n ? to + 8 * width : nullptr};
      store_tile<Token, kDim>(running.out[tile], inverse, rows, lane);
    }
  }

  template <int kTiles>
  __device__ void serve(const Queries& q, int32_t first) const {
    __syncwarp();
    Running<kDim, kTiles> running;
    for (int32_t key = 0; key < visible; key += 16) attend<kTiles>(q, key, running);
    finish<kTiles>(q, first, running);
  }
};

template <class Token, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 3)
attention_forward_kernel(Attention a, Token* out, float* lse) {
  SPCXR_DYNAMIC_SHARED(shared);
  const Team team;
  const Head head(a);
  const int32_t lane = team.lane();
  const VisibleKeys visible(a, head, lane);
  load_keys<Token, kDim>(a, head, team, visible, reinterpret_cast<unsigned char*>(shared),
                         [](int32_t, int32_t, int32_t) {});

  const Forward<Token, kDim> call{a,
                                  head,
                                  lane,
                                  visible.count,
                                  shared_address(shared) + across<kDim>(lane),
                                  shared_address(shared) + down<kDim>(lane),
                                  fmaxf(fabsf(a.scale) * kLog2E, 1e-30f),  // 0 * infinity is none
                                  out,
                                  lse};
  constexpr int32_t most_rows = 16 * kQueryTiles<kDim>;
  const int32_t step = team.warps() * most_rows;
  int32_t first = team.warp() * most_rows;
  typename Forward<Token, kDim>::Queries q;
  call.load_queries(first, q);
  wait_for_copies();
  __syncthreads();
  while (first < head.n) {
    if (head.n - first > 16) {
      call.template serve<kQueryTiles<kDim>>(q, first);
    } else {
      call.template serve<1>(q, first);
    }
    first += step;
    if (first < head.n) call.load_queries(first, q);
  }
  each_row_past<kDim>(a, head, team, [&](int64_t row, int32_t piece) {
    clear_piece(out + row * a.heads * kDim + head.h * kDim, piece);
    if (lse != nullptr && piece == 0) lse[head.h * a.total + row] = 0;
  });
}

}  // namespace spcxr
