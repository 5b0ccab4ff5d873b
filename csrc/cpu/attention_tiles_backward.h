// The backward pass of attention_tiles_body.h. For a block of 32 queries: scores and the weights'
// gradients, from them the weights and the scores' gradients in bfloat16, and dq. dk and dv are
// sums over queries: many blocks' weights are kept, so that few sums are read and written again.
// They are made transposed, [dim, keys], since then q and grad_out are what has to be transposed.
//
// The biases of k and v change neither weights nor gradients, as the scores' gradients of a row
// have the sum 0. That of k is taken off lse.
#pragma once

#include "cpu/attention_tiles_pack.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

class Backward {
 public:
  Backward(Parts& parts, const Attention& a, const AttentionGradient& g)
      : a_(a),
        g_(g),
        scale_(size_of(a.scale)),
        keys_(parts, a),
        blocks_(blocks_at_once(a.n_max)) {
    const int32_t padded_max = padded(a.n_max);
    const int64_t wide = padded_max, pitch = float_pitch(padded_max);
    for (Side* const side : {&query_, &out_}) {
      side->rows = parts.take<uint16_t>(kBlock * a.dim);
      side->across = parts.take<uint16_t>(a.dim * across_pitch());
      side->keys = parts.take<uint16_t>(wide * a.dim);
      side->products = parts.take<float>(kBlock * pitch);
      side->weights = parts.take<uint16_t>(blocks_ * kBlock * wide);
      side->sums = parts.take<float>(a.dim * pitch);
    }
    k_ = parts.take<uint16_t>(wide * a.dim);
    slopes_ = parts.take<uint16_t>(kBlock * half_pitch(padded_max));
    dq_ = parts.take<float>(kBlock * a.dim);
    rows_ = parts.take<Floats>(2 * kBlock);
    shift_ = parts.take<float>(kBlock);
    mean_ = parts.take<float>(kBlock);
  }

  // `next` is the pair that follows, or `pair` itself.
  void operator()(int64_t pair, int64_t next) {
    const Head head(a_, pair);
    head_ = &head;
    look_ahead(pair, next);
    keys_.find(a_, head.sequence);
    pitch_ = float_pitch(keys_.wide());
    slopes_pitch_ = half_pitch(keys_.wide());
    write_masked();
    if (keys_.count == 0) return;
    pack_transposed(keys_, head.k, head.dim, query_.keys);
    pack_transposed(keys_, head.v, head.dim, out_.keys);
    pack_straight(keys_, head.k, head.dim, k_);
    const int32_t blocks = padded(head.length) / kBlock;
    for (int32_t begin = 0; begin < blocks; begin += blocks_) {
      const int32_t count = smaller(blocks_, blocks - begin);
      for (int32_t block = 0; block < count; ++block) take_block(begin + block, block, count);
      add_up(query_, count, begin > 0);
      add_up(out_, count, begin > 0);
    }
    write_transposed(query_, scale_, head.rows<uint16_t>(a_, g_.dk, g_.dk_strides));
    write_transposed(out_, 1, head.rows<uint16_t>(a_, g_.dv, g_.dv_strides));
  }

 private:
  // What q, k and the scores' gradients are to one another, grad_out, v and the weights are too.
  struct Side {
    uint16_t* rows;     // [32, dim], a block of q or grad_out
    uint16_t* across;   // [dim, across_pitch()], many blocks of it, transposed
    uint16_t* keys;     // k or v, packed
    float* products;    // [32, pitch_], rows x keys^T: scores or the weights' gradients
    uint16_t* weights;  // the scores' gradients or the weights: right sides with pairs of queries
    float* sums;        // [dim, pitch_], dk / scale or dv, transposed
  };

  // Blocks of queries whose weights are kept; each takes 64 bytes a key and side.
  static int32_t blocks_at_once(int32_t n_max) {
    constexpr int32_t kKeptKeys = 8192;  // 1 MiB, half of the second-level cache beside AMX
    const int32_t wide = padded(n_max), fit = wide > 0 ? kKeptKeys / wide : 1;
    return fit < 1 ? 1 : smaller(fit, wide / kBlock);
  }
  int64_t across_pitch() const { return half_pitch(blocks_ * kBlock); }

  void look_ahead(int64_t pair, int64_t next) {
    ahead_.clear();
    if (next == pair) return;
    const Head head(a_, next);
    ahead_.open(head);
    ahead_.add(head.dense_rows<const uint16_t>(a_, g_.grad_out));
  }

  // Block `block` of all is number `kept` of the `count` that are kept.
  void take_block(int32_t block, int32_t kept, int32_t count) {
    const int32_t rows = smaller(kBlock, head_->length - block * kBlock);
    const int64_t first = int64_t{block} * kBlock;
    const RowsOf<const uint16_t> from = head_->dense_rows<const uint16_t>(a_, g_.grad_out);
    load_block(Rows{head_->q[first], head_->q.pitch}, rows, head_->dim, head_->q_bias, a_.scale < 0,
               query_.rows);
    load_block(Rows{from[first], from.pitch}, rows, head_->dim, nullptr, false, out_.rows);
    find_shifts(first, rows);
    for (Side* const side : {&query_, &out_}) {
      pack_across(side->rows, side->across + kept * kBlock);
      multiply_keys(*side, rows);
    }
    for (int32_t r = 0; r < kBlock; ++r) ahead_.row(block * kBlock + r);
    make_weights(rows, kept, count);
    const int32_t steps = keys_.wide() / kDepth;
    for (int32_t d = 0; d < head_->dim; d += kBlock) {
      const Right keys{k_ + int64_t{d} * keys_.wide(), steps * kTile};
      multiply(rows, steps, Left{slopes_, slopes_pitch_}, keys, Sums{dq_ + d, head_->dim}, false);
    }
    write_block(first, rows);
  }

  // A block's rows as columns.
  [[gnu::noinline]] void pack_across(const uint16_t* rows, uint16_t* to) const {
    const int64_t dim = head_->dim, pitch = across_pitch();
    for (const uint16_t* const end = rows + dim; rows < end; rows += kLanes, to += kLanes * pitch) {
      Words tile[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        tile[r] = pair_of_rows(rows + 2 * r * dim, rows + (2 * r + 1) * dim);
      }
      transpose(tile);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) store(to + r * pitch, tile[r]);
    }
  }

  // What is subtracted in each row's exponent of 2; weights of rows that are not there become 0.
  void find_shifts(int64_t first, int32_t rows) {
    const float* const lse = g_.lse + head_->head * a_.total + head_->first_row + first;
    for (int32_t r = 0; r < kBlock; ++r) {
      shift_[r] = r < rows ? lse[r] : __builtin_inff();
      rows_[r] = head_->k_bias == nullptr
                     ? Floats{}
                     : products(query_.rows + r * head_->dim, head_->k_bias, head_->dim);
    }
    for (int32_t r = 0; r < kBlock; r += kLanes) {
      store(shift_ + r, (load<Floats>(shift_ + r) - row_sums(rows_ + r) * scale_) * kLog2e);
    }
  }

  void multiply_keys(const Side& side, int32_t rows) const {
    const int32_t steps = head_->dim / kDepth;
    for (int32_t j = 0; j < keys_.wide(); j += kBlock) {
      multiply(rows, steps, Left{side.rows, head_->dim},
               Right{side.keys + int64_t{j} * head_->dim, steps * kTile},
               Sums{side.products + j, pitch_}, false);
    }
  }

  // The weights of rows begin..end take the scores' place.
  [[gnu::noinline]] void find_weights(int32_t begin, int32_t end) {
    const int32_t count = keys_.count, wide = keys_.wide(), whole = count / kLanes * kLanes;
    const int64_t pitch = pitch_;
    float* scores = query_.products + begin * pitch;
    const float* gradients = out_.products + begin * pitch;
    const Floats scale = all(scale_ * kLog2e);
    for (int32_t r = begin; r < end; ++r, scores += pitch, gradients += pitch) {
      const Floats shift = all(shift_[r]);
      Floats sum{}, product{};
      const auto weight = [&](int32_t j) { return exp2(load<Floats>(scores + j) * scale - shift); };
      const auto put = [&](int32_t j, Floats weights) {
        sum = sum + weights;
        product = product + weights * load<Floats>(gradients + j);
        store(scores + j, weights);
      };
      for (int32_t j = 0; j < whole; j += kLanes) put(j, weight(j));
      for (int32_t j = whole; j < wide; j += kLanes) put(j, first(count - j, weight(j), 0));
      rows_[r] = sum;
      rows_[kBlock + r] = product;
    }
  }

  // What is taken off the weights' gradients of a row: their mean by weight. It is grad_out . out,
  // but out was rounded, and where one weight is nearly 1 the difference is smaller than that.
  void find_means(int32_t r) {
    const Floats sum = row_sums(rows_ + r), product = row_sums(rows_ + kBlock + r);
    store(mean_ + r, sum > 0 ? product / sum : Floats{});
  }

  // Of pairs of rows: weights, and the scores' gradients twice, by queries for dq and in pairs of
  // queries for dk.
  [[gnu::noinline]] void write_weights(int32_t begin, int32_t end, int32_t kept,
                                       int32_t count) const {
    const int64_t column = int64_t{count} * kTile, pitch = pitch_;
    const int32_t wide = keys_.wide();
    for (int32_t r = begin; r < end; r += 2) {
      const float* const one = query_.products + r * pitch;
      const float* const gradients = out_.products + r * pitch;
      uint16_t* weights = out_.weights + kept * kTile + r * kLanes;
      uint16_t* slopes = query_.weights + kept * kTile + r * kLanes;
      uint16_t *const row = slopes_ + r * slopes_pitch_, *const next_row = row + slopes_pitch_;
      const Floats mean = all(mean_[r]), next_mean = all(mean_[r + 1]);
      for (int32_t j = 0; j < wide; j += kLanes, weights += column, slopes += column) {
        const Floats a = load<Floats>(one + j), b = load<Floats>(one + pitch + j);
        store(weights, paired(rounded(a, b)));
        const Halves both = rounded(a * (load<Floats>(gradients + j) - mean),
                                    b * (load<Floats>(gradients + pitch + j) - next_mean));
        store(slopes, paired(both));
        store_apart(row + j, next_row + j, both);
      }
    }
  }

  void write_zero_weights(int32_t begin, int32_t end, int32_t kept, int32_t count) const {
    for (int32_t j = 0; j < keys_.wide(); j += kLanes) {
      const int64_t tile = (int64_t{j / kLanes} * count + kept) * kTile;
      for (int32_t r = begin; r < end; r += 2) {
        store(query_.weights + tile + r * kLanes, Words{});
        store(out_.weights + tile + r * kLanes, Words{});
      }
    }
  }

  // Sixteen rows at a time: what the first step writes is still near for the next.
  void make_weights(int32_t rows, int32_t kept, int32_t count) {
    const int32_t seen = (rows + 1) / 2 * 2;
    for (int32_t begin = 0; begin < seen; begin += kLanes) {
      const int32_t end = smaller(begin + kLanes, seen);
      find_weights(begin, end);
      find_means(begin);
      write_weights(begin, end, kept, count);
    }
    write_zero_weights(seen, kBlock, kept, count);
  }

  void add_up(const Side& side, int32_t blocks, bool more) const {
    const int64_t column = int64_t{blocks} * kTile;
    for (int32_t j = 0; j < keys_.wide(); j += kBlock) {
      for (int32_t d = 0; d < head_->dim; d += kBlock) {
        multiply(kBlock, blocks, Left{side.across + d * across_pitch(), across_pitch()},
                 Right{side.weights + j / kLanes * column, column},
                 Sums{side.sums + d * pitch_ + j, pitch_}, more);
      }
    }
  }

  [[gnu::noinline]] void write_block(int64_t first, int32_t rows) const {
    const RowsOf<uint16_t> dq = head_->rows<uint16_t>(a_, g_.dq, g_.dq_strides);
    const float* from = dq_;
    const float scale = a_.scale;
    const int32_t dim = head_->dim;
    for (int32_t r = 0; r < rows; ++r) {
      uint16_t* const to = dq[first + r];
      for (int32_t d = 0; d < dim; d += kBlock, from += kBlock) {
        store(to + d, rounded(load<Floats>(from) * scale, load<Floats>(from + kLanes) * scale));
      }
    }
  }

  // The visible keys' rows, times `scale`.
  [[gnu::noinline]] void write_transposed(const Side& side, float scale,
                                          const RowsOf<uint16_t> to) const {
    const VisibleKeys keys = keys_;
    const int64_t pitch = pitch_;
    const int32_t dim = head_->dim;
    for (int32_t j = 0; j < keys.count; j += kLanes) {
      for (int32_t d = 0; d < dim; d += kDepth) {
        Words tile[16];
        const float* const sums = side.sums + d * pitch + j;
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const float *const one = sums + 2 * i * pitch, *const next = one + pitch;
          tile[i] = paired(rounded(load<Floats>(one) * scale, load<Floats>(next) * scale));
        }
        transpose(tile);
        for (int i = 0; i < 16 && j + i < keys.count; ++i) {
          store(to[keys.ids[j + i]] + d, tile[i]);
        }
      }
    }
  }

  // Zeros for keys that are masked; for queries, when all are.
  void write_masked() const {
    const auto clear = [&](void* of, const Strides& strides, int32_t i) {
      const RowsOf<uint16_t> rows = head_->rows<uint16_t>(a_, of, strides);
      __builtin_memset(rows[i], 0, size_t(head_->dim) * sizeof *rows.first);
    };
    for (int32_t i = 0; i < head_->length; ++i) {
      if (keys_.count == 0) clear(g_.dq, g_.dq_strides, i);
      if (!a_.masked(head_->sequence, i)) continue;
      clear(g_.dk, g_.dk_strides, i);
      clear(g_.dv, g_.dv_strides, i);
    }
  }

  const Attention& a_;
  const AttentionGradient& g_;
  float scale_;
  VisibleKeys keys_;
  int32_t blocks_;  // at once
  Side query_, out_;
  uint16_t *k_, *slopes_;   // packed for dq; [32, slopes_pitch_], the scores' gradients
  float* dq_;               // [32, dim], without the scale
  Floats* rows_;            // [2, 32], of each row sixteen shares of a sum
  float *shift_, *mean_;    // [32]
  const Head* head_ = nullptr;
  Ahead ahead_;
  int64_t pitch_ = 0, slopes_pitch_ = 0;
};

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
