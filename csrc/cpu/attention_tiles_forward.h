// The forward pass of attention_tiles_body.h. Blocks of 32 queries go through three stages: scores,
// softmax, output. In a turn each stage has another block, so that the tiles multiply for two of
// them while the vectors work on the third.
//
// The bias of k moves all logits of a row alike: the softmax does not see it, lse alone does. That
// of v, as the weights' sum is 1, is added to out.
#pragma once

#include "cpu/attention_tiles_pack.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

class Forward {
 public:
  Forward(Parts& parts, const Attention& a, void* out, float* lse)
      : a_(a),
        out_(out),
        lse_(lse),
        scale_(size_of(a.scale) * kLog2e),
        keys_(parts, a),
        k_(parts.take<uint16_t>(int64_t{padded(a.n_max)} * a.dim)),
        v_(parts.take<uint16_t>(int64_t{padded(a.n_max)} * a.dim)),
        queries_(parts.take<uint16_t>(kBlock * a.dim)),
        output_(parts.take<float>(kBlock * a.dim)),
        rows_(parts.take<Floats>(kBlock)),
        most_(parts.take<float>(kBlock)) {
    for (Buffer& buffer : buffers_) {
      buffer.scores = parts.take<float>(kBlock * float_pitch(padded(a.n_max)));
      buffer.weights = parts.take<uint16_t>(kBlock * half_pitch(padded(a.n_max)));
      buffer.part = parts.take<float>(kBlock);
      buffer.shift = parts.take<float>(kBlock);
    }
  }

  // `next` is the pair that follows, or `pair` itself.
  void operator()(int64_t pair, int64_t next) {
    const Head head(a_, pair);
    head_ = &head;
    ahead_.clear();
    if (next != pair) ahead_.open(Head(a_, next));
    keys_.find(a_, head.sequence);
    if (keys_.count == 0) return write_nothing();
    scores_pitch_ = float_pitch(keys_.wide());
    weights_pitch_ = half_pitch(keys_.wide());
    pack_transposed(keys_, head.k, head.dim, k_);
    pack_straight(keys_, head.v, head.dim, v_);
    for (int32_t turn = -1; (turn - 1) * kBlock < head.length; ++turn) take_turn(turn);
  }

 private:
  struct Buffer {
    float* scores;        // [32, scores_pitch_]
    uint16_t* weights;    // [32, weights_pitch_], not divided by their sum
    float *part, *shift;  // of each row: 1 / the weights' sum; what the bias of k adds to logits
  };

  int32_t rows_of(int32_t block) const {
    if (block < 0) return 0;
    const int32_t left = head_->length - block * kBlock;
    return left < 0 ? 0 : left < kBlock ? left : kBlock;
  }

  void take_turn(int32_t turn) {
    const int32_t next = rows_of(turn + 1), rows = rows_of(turn), last = rows_of(turn - 1);
    const int32_t outputs = last > 0 ? head_->dim / kBlock : 0;
    const int32_t steps = outputs + (next > 0 ? keys_.wide() / kBlock : 0);
    Buffer& now = buffers_[turn & 1];
    Buffer& other = buffers_[~turn & 1];
    if (next > 0) load_queries(turn + 1, other, next);
    if (rows > 0) find_maxima(now, rows);
    int32_t done = 0;
    for (int32_t step = 0; step < steps; ++step) {
      if (step < outputs) {
        make_output(other, last, step * kBlock);
      } else {
        make_scores(other, next, (step - outputs) * kBlock);
      }
      const int32_t end = rows * (step + 1) / steps;
      for (int32_t r = done; r < end; ++r) ahead_.row(turn * kBlock + r);
      make_weights(now, done, end);
      done = end;
    }
    make_weights(now, done, rows);
    if (last > 0) write_output(other, turn - 1, last);
    if (rows > 0) close_softmax(now, turn, rows);
  }

  void load_queries(int32_t block, Buffer& buffer, int32_t rows) {
    const Rows from{head_->q[block * kBlock], head_->q.pitch};
    load_block(from, rows, head_->dim, head_->q_bias, a_.scale < 0, queries_);
    if (lse_ == nullptr || head_->k_bias == nullptr) return;
    for (int32_t r = 0; r < kBlock; ++r) {
      rows_[r] = products(queries_ + r * head_->dim, head_->k_bias, head_->dim);
    }
    for (int32_t r = 0; r < kBlock; r += kLanes) {
      store(buffer.shift + r, row_sums(rows_ + r) * size_of(a_.scale));
    }
  }

  void make_scores(const Buffer& buffer, int32_t rows, int32_t first_key) {
    const int32_t steps = head_->dim / kDepth;
    const Right keys{k_ + int64_t{first_key} * head_->dim, steps * kTile};
    multiply(rows, steps, Left{queries_, head_->dim}, keys,
             Sums{buffer.scores + first_key, scores_pitch_}, false);
  }

  void make_output(const Buffer& buffer, int32_t rows, int32_t first) {
    const int32_t steps = keys_.wide() / kDepth;
    const Right values{v_ + int64_t{first} * keys_.wide(), steps * kTile};
    multiply(rows, steps, Left{buffer.weights, weights_pitch_}, values,
             Sums{output_ + first, head_->dim}, false);
  }

  [[gnu::noinline]] void find_maxima(const Buffer& buffer, int32_t rows) {
    const float least = -__builtin_inff();
    const int32_t whole = keys_.count / kLanes * kLanes;
    for (int32_t r = 0; r < rows; ++r) {
      const float* const scores = buffer.scores + r * scores_pitch_;
      Floats most = first(keys_.count - whole, load<Floats>(scores + whole), least);
#pragma GCC unroll 4
      for (int32_t j = 0; j < whole; j += kLanes) most = larger(most, load<Floats>(scores + j));
      rows_[r] = most;
    }
    for (int32_t r = 0; r < rows; r += kLanes) {
      store(most_ + r, row_maxima(rows_ + r) * scale_);
    }
  }

  [[gnu::noinline]] void make_weights(const Buffer& buffer, int32_t begin, int32_t end) {
    const int32_t count = keys_.count;
    const int64_t pitch = scores_pitch_, weights_pitch = weights_pitch_;
    const float* scores = buffer.scores + begin * pitch;
    uint16_t* weights = buffer.weights + begin * weights_pitch;
    const Floats scale = all(scale_);
    for (int32_t r = begin; r < end; ++r, scores += pitch, weights += weights_pitch) {
      const Floats most = all(most_[r]);
      const auto weight = [&](int32_t j) { return exp2(load<Floats>(scores + j) * scale - most); };
      Floats sum{}, more{};
      int32_t j = 0;
      for (; j + kBlock <= count; j += kBlock) {
        const Floats low = weight(j), high = weight(j + kLanes);
        sum = sum + low;
        more = more + high;
        store(weights + j, rounded(low, high));
      }
      if (const int32_t left = count - j; left > 0) {
        const Floats low = first(left, weight(j), 0);
        const Floats high =
            left > kLanes ? first(left - kLanes, weight(j + kLanes), 0) : Floats{};
        sum = sum + low;
        more = more + high;
        store(weights + j, rounded(low, high));
      }
      rows_[r] = sum + more;
    }
  }

  [[gnu::noinline]] void close_softmax(const Buffer& buffer, int32_t block, int32_t rows) {
    float sums[kBlock];
    for (int32_t r = 0; r < rows; r += kLanes) {
      const Floats sum = row_sums(rows_ + r);
      store(sums + r, sum);
      store(buffer.part + r, 1.0f / sum);
    }
    if (lse_ == nullptr) return;
    float* const lse = lse_ + head_->head * a_.total + head_->first_row + block * kBlock;
    for (int32_t r = 0; r < rows; ++r) {
      lse[r] = most_[r] * kLn2 + __builtin_logf(sums[r]);
      if (head_->k_bias != nullptr) lse[r] += buffer.shift[r];
    }
  }

  [[gnu::noinline]] void write_output(const Buffer& buffer, int32_t block, int32_t rows) {
    const RowsOf<uint16_t> out = head_->dense_rows<uint16_t>(a_, out_);
    const uint16_t* const bias = head_->v_bias;
    const int32_t dim = head_->dim;
    for (int32_t r = 0; r < rows; ++r) {
      const float* const from = output_ + r * dim;
      uint16_t* const to = out[block * kBlock + r];
      const Floats part = all(buffer.part[r]);
      for (int32_t d = 0; d < dim; d += kBlock) {
        Floats low = load<Floats>(from + d) * part;
        Floats high = load<Floats>(from + d + kLanes) * part;
        if (bias != nullptr) {
          low = low + (Floats)(widened(bias + d) << 16);
          high = high + (Floats)(widened(bias + d + kLanes) << 16);
        }
        store(to + d, rounded(low, high));
      }
    }
  }

  void write_nothing() {
    const RowsOf<uint16_t> out = head_->dense_rows<uint16_t>(a_, out_);
    for (int32_t i = 0; i < head_->length; ++i) {
      __builtin_memset(out[i], 0, size_t(head_->dim) * sizeof *out.first);
      if (lse_ != nullptr) {
        lse_[head_->head * a_.total + head_->first_row + i] = __builtin_inff();
      }
    }
  }

  const Attention& a_;
  void* out_;
  float* lse_;
  float scale_;  // of scores, to powers of 2
  VisibleKeys keys_;
  uint16_t *k_, *v_;    // packed
  uint16_t* queries_;   // [32, dim]
  float* output_;       // [32, dim]
  Floats* rows_;        // [32], of each row sixteen shares of its maximum or sum
  float* most_;         // [32], of each row the largest exponent of 2
  Buffer buffers_[2];
  const Head* head_ = nullptr;
  Ahead ahead_;
  int64_t scores_pitch_ = 0, weights_pitch_ = 0;
};

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
