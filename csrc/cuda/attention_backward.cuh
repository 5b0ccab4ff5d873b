// The backward pass: a block holds the visible keys and values, the queries and their gradients of
// a (sequence, head) in shared memory. Its warps take tiles of keys, for dk and dv, and tiles of
// queries, for dq; both make the probabilities anew from lse. No sum crosses warps.
//
// With s and p as in core/attention.h: s - lse is the same without k's bias in both, and
// do . v - do . out without v's.
#pragma once

#include "cuda/attention_tiles.cuh"

namespace spcxr {

// Tiles of 16 rows that a warp takes at once.
template <int kDim>
constexpr int kBackwardTiles = kDim == 128 ? 1 : 2;

// What a block serves, kept in shared memory: there are no registers for it in the long loops.
struct Served {
  Head head;
  int32_t visible, warps;
};
static_assert(sizeof(Served) <= kServedBytes, "backward_bytes() counts it");

// The parts of shared memory: pairs of tiles of queries and gradients, of keys and values, and
// numbers of the queries and slots. Found anew wherever needed, as registers are dear.
template <int kDim>
struct BackwardShared {
  int32_t rows;

  __device__ unsigned char* queries() const {
    SPCXR_DYNAMIC_SHARED(memory);
    return reinterpret_cast<unsigned char*>(memory);
  }
  __device__ unsigned char* keys() const { return queries() + rows * (kDim * 2 * 2); }
  // Of a query lse, in exponents of two, and 16 further delta, do . out.
  __device__ float* numbers(int32_t query) const {
    return reinterpret_cast<float*>(queries() + rows * (kDim * 2 * 4)) + query / 16 * 32 +
           query % 16;
  }
  __device__ uint16_t* sources() const {  // of a slot: its key
    return reinterpret_cast<uint16_t*>(queries() + rows * (kDim * 2 * 4 + 2 * 4));
  }
  __device__ Served* served() const { return reinterpret_cast<Served*>(sources() + rows); }
};

// A call as a block sees it.
template <class Token, int kDim>
struct Backward {
  static constexpr int kPair = 2 * kTile<kDim>;
  template <int kTiles>
  using Sums = float[kTiles][kDim / 8][4];

  const Attention& a;
  const AttentionGradient& g;
  const Team& team;
  const Served& served;
  BackwardShared<kDim> shared;

  // Queries with their bias, gradients, and of each query lse and delta. Rows up to a whole tile
  // are zeros whose probabilities are 0.
  __device__ void load_queries() const {
    constexpr int pieces = kDim / 8;
    const Token* q = served.head.tokens<Token>(a, a.q, a.q_strides);
    const int64_t first = served.head.row * a.heads * kDim + served.head.h * kDim;
    const Token* out = static_cast<const Token*>(g.out) + first;
    const Token* grad = static_cast<const Token*>(g.grad_out) + first;
    each_piece<kDim>(team, whole_tiles(served.head.n), [&](int32_t i, int32_t piece) {
      uint4 query = make_uint4(0, 0, 0, 0), gradient = query, output = query;
      float lse = INFINITY;
      if (i < served.head.n) {
        const int64_t at = int64_t{i} * a.heads * kDim + piece * 8;
        query = load_raw(q + i * a.q_strides.token + piece * 8);
        gradient = load_raw(grad + at);
        output = load_raw(out + at);
        lse = g.lse[served.head.h * a.total + served.head.row + i];
      }
      float of_out = 0, of_bias = 0;
      if (a.bias != nullptr) {
        query = add(Token{}, query, load_raw(bias_of<Token>(a, 0, served.head.h) + piece * 8));
        of_bias = dot(query, load_raw(bias_of<Token>(a, 1, served.head.h) + piece * 8));
        of_out = -dot(gradient, load_raw(bias_of<Token>(a, 2, served.head.h) + piece * 8));
      }
      of_out += dot(gradient, output);
#pragma unroll
      for (int step = 1; step < pieces; step *= 2) {
        of_out += __shfl_xor_sync(kAllLanes, of_out, static_cast<unsigned>(step));
        of_bias += __shfl_xor_sync(kAllLanes, of_bias, static_cast<unsigned>(step));
      }
      unsigned char* to = shared.queries() + place<kDim>(i, piece);
      *reinterpret_cast<uint4*>(to) = query;
      *reinterpret_cast<uint4*>(to + kTile<kDim>) = gradient;
      if (piece != 0) return;
      shared.numbers(i)[0] = fmaf(-a.scale, of_bias, lse) * kLog2E;
      shared.numbers(i)[16] = of_out;
    });
  }
  static __device__ float dot(uint4 left, uint4 right) {
    float x[8], y[8], sum = 0;
    spread(left, x, Token{});
    spread(right, y, Token{});
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(x[i], y[i], sum);
    return sum;
  }

  // The lane's addresses in rows of shared memory, see cuda/attention_tiles.cuh.
  __device__ uint32_t across_of(const unsigned char* rows) const {
    return shared_address(rows) + across<kDim>(team.lane());
  }
  __device__ uint32_t down_of(const unsigned char* rows) const {
    return shared_address(rows) + down<kDim>(team.lane());
  }

  // dk and dv of the keys in slots `first` and on. Rows are keys, columns queries.
  template <int kTiles>
  __device__ void serve_keys(int32_t first) const {
    __syncwarp();
    uint32_t k[kTiles][kDim / 16][4], v[kTiles][kDim / 16][4];
    const uint32_t from = down_of(shared.keys()) + first / 16 * kPair;
    load_tiles<kDim, kTiles>(from, 0, k);
    load_tiles<kDim, kTiles>(from, kTile<kDim>, v);
    uint32_t rows_across = across_of(shared.queries()), rows_down = down_of(shared.queries());
    const float scale = a.scale * kLog2E;
    Sums<kTiles> dk = {}, dv = {};
    const float* numbers = shared.numbers(team.lane() % 4 * 2);
    const int32_t n = served.head.n;
    for (int32_t i = 0; i < n; i += 16, rows_across += kPair, rows_down += kPair, numbers += 32) {
      float p[kTiles][2][4] = {}, ds[kTiles][2][4] = {};
      multiply_rows<Token, kDim, kTiles>(k, rows_across, 0, p);
#pragma unroll
      for (int e = 0; e < 2 * kTiles * 4; ++e) {
        float& value = p[e / 8][e / 4 % 2][e % 4];
        value = power_of_two(fmaf(value, scale, -numbers[e / 4 % 2 * 8 + e % 2]));
      }
      add_product<Token, kDim, kTiles>(p, rows_down, kTile<kDim>, dv);
      multiply_rows<Token, kDim, kTiles>(v, rows_across, kTile<kDim>, ds);
#pragma unroll
      for (int e = 0; e < 2 * kTiles * 4; ++e) {
        float& value = ds[e / 8][e / 4 % 2][e % 4];
        value = (value - numbers[16 + e / 4 % 2 * 8 + e % 2]) * p[e / 8][e / 4 % 2][e % 4];
      }
      add_product<Token, kDim, kTiles>(ds, rows_down, 0, dk);
    }
    __syncwarp();  // so that nothing below is read above, where registers are dear
    const int32_t lane = team.lane();
    Token* dk_rows = served.head.gradient<Token>(a, g.dk, g.dk_strides);
    Token* dv_rows = served.head.gradient<Token>(a, g.dv, g.dv_strides);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      Token *dk_at[2] = {}, *dv_at[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t slot = first + 16 * tile + 8 * half + lane / 4;
        if (slot >= served.visible) continue;
        const int32_t j = shared.sources()[slot];
        dk_at[half] = dk_rows + j * g.dk_strides.token;
        dv_at[half] = dv_rows + j * g.dv_strides.token;
      }
      store_tile<Token, kDim>(dk[tile], {a.scale, a.scale}, dk_at, lane);
      store_tile<Token, kDim>(dv[tile], {1, 1}, dv_at, lane);
    }
  }

  // dq of the queries `first` and on. Rows are queries, columns slots of keys.
  template <int kTiles>
  __device__ void serve_queries(int32_t first) const {
    __syncwarp();
    uint32_t q[kTiles][kDim / 16][4], grad[kTiles][kDim / 16][4];
    const uint32_t from = down_of(shared.queries()) + first / 16 * kPair;
    load_tiles<kDim, kTiles>(from, 0, q);
    load_tiles<kDim, kTiles>(from, kTile<kDim>, grad);
    uint32_t rows_across = across_of(shared.keys()), rows_down = down_of(shared.keys());
    float lse[kTiles][2], delta[kTiles][2];
#pragma unroll
    for (int row = 0; row < 2 * kTiles; ++row) {
      const float* numbers = shared.numbers(first + 8 * row + team.lane() / 4);
      lse[row / 2][row % 2] = numbers[0];
      delta[row / 2][row % 2] = numbers[16];
    }
    const float scale = a.scale * kLog2E;
    Sums<kTiles> dq = {};
    const int32_t visible = served.visible, lane = team.lane();
    for (int32_t j = 0; j < visible; j += 16, rows_across += kPair, rows_down += kPair) {
      float p[kTiles][2][4] = {}, ds[kTiles][2][4] = {};
      multiply_rows<Token, kDim, kTiles>(q, rows_across, 0, p);
      multiply_rows<Token, kDim, kTiles>(grad, rows_across, kTile<kDim>, ds);
#pragma unroll
      for (int e = 0; e < 2 * kTiles * 4; ++e) {
        const int tile = e / 8, eight = e / 4 % 2, half = e / 2 % 2;
        const float power = power_of_two(fmaf(p[tile][eight][e % 4], scale, -lse[tile][half]));
        ds[tile][eight][e % 4] = (ds[tile][eight][e % 4] - delta[tile][half]) * power;
      }
      if (visible - j < 16) {  // past the last key, a power may be infinite
#pragma unroll
        for (int e = 0; e < 2 * kTiles * 4; ++e) {
          const int32_t column = e / 4 % 2 * 8 + lane % 4 * 2 + e % 2;
          if (column >= visible - j) ds[e / 8][e / 4 % 2][e % 4] = 0;
        }
      }
      add_product<Token, kDim, kTiles>(ds, rows_down, 0, dq);
    }
    __syncwarp();
    Token* rows = served.head.gradient<Token>(a, g.dq, g.dq_strides);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int32_t i = first + 16 * tile + lane / 4;
      Token* to = rows + i * g.dq_strides.token;
      Token* const at[2] = {i < served.head.n ? to : nullptr,
                            i + 8 < served.head.n ? to + 8 * g.dq_strides.token : nullptr};
      store_tile<Token, kDim>(dq[tile], {a.scale, a.scale}, at, lane);
    }
  }
};

template <class Token, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 2)
attention_backward_kernel(Attention a, AttentionGradient g) {
  const Team team;
  const Head head(a);
  const VisibleKeys visible(a, head, team.lane());
  const BackwardShared<kDim> shared{whole_tiles(a.n_max)};
  const auto note = [&](int32_t j, int32_t piece, int32_t slot) {
    if (slot < 0) {
      clear_piece(head.gradient<Token>(a, g.dk, g.dk_strides) + j * g.dk_strides.token, piece);
      clear_piece(head.gradient<Token>(a, g.dv, g.dv_strides) + j * g.dv_strides.token, piece);
    } else if (piece == 0) {
      shared.sources()[slot] = static_cast<uint16_t>(j);
    }
  };
  load_keys<Token, kDim>(a, head, team, visible, shared.keys(), note);
  const Served loading{head, visible.count, team.warps()};
  Backward<Token, kDim>{a, g, team, loading, shared}.load_queries();
  each_row_past<kDim>(a, head, team, [&](int64_t row, int32_t piece) {
    const auto clear = [&](void* of, const Strides& s) {
      clear_piece(static_cast<Token*>(of) + row * s.token + head.h * s.head, piece);
    };
    clear(g.dq, g.dq_strides), clear(g.dk, g.dk_strides), clear(g.dv, g.dv_strides);
  });
  if (threadIdx.x == 0) *shared.served() = loading;
  wait_for_copies();
  __syncthreads();
  const Served& served = *shared.served();
  const Backward<Token, kDim> call{a, g, team, served, shared};
  constexpr int kTiles = kBackwardTiles<kDim>;
  int32_t turn = team.warp();
  for (; turn * 16 * kTiles < served.visible; turn += served.warps) {
    const int32_t first = turn * 16 * kTiles;
    if (served.visible - first > 16) {
      call.template serve_keys<kTiles>(first);
    } else {
      call.template serve_keys<1>(first);
    }
  }
  // The other way round: who had fewer tiles of keys has more of queries.
  turn = served.warps - 1 - turn % served.warps;
  for (; turn * 16 * kTiles < served.head.n; turn += served.warps) {
    const int32_t first = turn * 16 * kTiles;
    if (served.head.n - first > 16) {
      call.template serve_queries<kTiles>(first);
    } else {
      call.template serve_queries<1>(first);
    }
  }
}

}  // namespace spcxr
