// Masked attention in float arithmetic, forward and backward, in namespace SPCXR_ISA: the including
// file names it, CMake gives its compiler flags. For one head of one sequence, the keys that are not
// masked are laid side by side once; then block by block of queries: scores, softmax, products. What
// is inline in a header must not leave this object file, as in kernels_body.h.
#define SPCXR_HD inline __attribute__((always_inline))

#include "cpu/attention.h"

#include "cpu/attention_rows.h"
#include "cpu/kernels.h"
#include "cpu/parts.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

constexpr int32_t kMostQueries = 64;  // of a block
constexpr int32_t kMostScores = 16384;  // of a block of the forward pass: they stay in a near cache
constexpr int32_t kMostKeys = 256;  // of a step over a block's keys, a multiple of kPanel
constexpr int32_t kSummedKeys = 64;  // at a time, into an output

// A row of n numbers, so far from the next that a column of them fits a cache.
inline int32_t pitch_of(int32_t n) { return round_up(n, 16) | 16; }

// What forward and backward share: the keys of one head that are not masked.
template <typename Token>
class Head {
 public:
  using Bits = typename Token::Bits;

  Head(Parts& parts, const Attention& a)
      : a_(a),
        width_(round_up(a.dim, kVectorFloats)),
        panels_((width_ + kPanel - 1) / kPanel),
        visible_(parts.take<int32_t>(a.n_max)),
        bias_(parts.take<float>(3 * width_)),
        stage_(parts.take<float>(kPanel * width_)) {}

  // Lists the keys of pair b * heads + h.
  void open(int64_t pair) {
    b_ = pair / a_.heads;
    h_ = static_cast<int32_t>(pair % a_.heads);
    length_ = a_.length(b_);
    keys_ = 0;
    for (int32_t j = 0; j < length_; ++j) {
      visible_[keys_] = j;
      keys_ += !a_.masked(b_, j);
    }
    for (int32_t which = 0; which < 3; ++which) open_bias(which);
  }

 protected:
  // The biases of q, k, v: rows 0, 1, 2.
  void open_bias(int32_t which) {
    float* const to = bias_ + which * width_;
    std::memset(to, 0, size_t(width_) * sizeof(float));
    if (a_.bias == nullptr) return;
    const Bits* const from = static_cast<const Bits*>(a_.bias) +
                             (int64_t{which} * a_.heads + h_) * a_.dim;
    for (int32_t d = 0; d < a_.dim; ++d) to[d] = Token::to(from[d]);
  }

  Entry entry(int32_t which) const {
    return Entry{bias_ + which * width_, which == 0 ? a_.scale : 1.0f};
  }
  const Bits* first(const void* values, const Strides& s) const {
    return static_cast<const Bits*>(values) + a_.first_element(s, b_, h_);
  }
  // Element (row i, head h) of something that lies like out.
  int64_t out_element(int32_t i) const {
    return ((a_.first_row(b_) + i) * a_.heads + h_) * a_.dim;
  }
  int64_t lse_element(int32_t i) const { return h_ * a_.total + a_.first_row(b_) + i; }

  // Calls `work` with each panel's first key and its rows [kPanel, width_].
  template <typename Work>
  void by_panels(const void* values, const Strides& s, int32_t which, const Work& work) {
    const Bits* const from = first(values, s);
    const Entry in = entry(which);
    for (int32_t j = 0; j < keys_; j += kPanel) {
      for (int32_t i = 0; i < kPanel; ++i) {
        float* const row = stage_ + i * width_;
        if (j + i < keys_) {
          read_row<Token>(from + visible_[j + i] * s.token, in, a_.dim, row);
        } else {
          std::memset(row, 0, size_t(width_) * sizeof(float));
        }
      }
      work(j, stage_);
    }
  }
  // Rows `stage` of keys from j on, into panels that have room for n_max keys.
  void put_keys(const float* stage, int32_t j, float* panels) const {
    for (int32_t i = 0; i < smaller(kPanel, keys_ - j); ++i) {
      put_in_panels(stage + i * width_, width_, key_panel(), panels + (j + i) * kPanel);
    }
  }
  int64_t key_panel() const { return int64_t{a_.n_max} * kPanel; }
  int64_t across_size() const { return int64_t{round_up(a_.n_max, kPanel)} * width_; }

  void write_row(const float* row, float scale, Bits* to) const {
    convert<Token>(row, a_.dim, scale, -0.0f, to);
  }
  void write_zeros(Bits* to) const { std::memset(to, 0, size_t(a_.dim) * sizeof(Bits)); }

  const Attention& a_;
  int32_t width_, panels_;  // of a row: dim and zeros
  int32_t* visible_;
  float* bias_;
  float* stage_;
  int64_t b_ = 0;
  int32_t h_ = 0, length_ = 0, keys_ = 0;
};

template <typename Token>
class Forward : Head<Token> {
 public:
  using Base = Head<Token>;
  using typename Base::Bits;

  Forward(Parts& parts, const Attention& a)
      : Base(parts, a),
        across_(parts.take<float>(this->across_size())),
        values_(parts.take<float>(this->panels_ * this->key_panel())),
        queries_(parts.take<float>(kMostQueries * this->width_)),
        scores_(parts.take<float>(most_scores(a.n_max))),
        outs_(parts.take<float>(kMostQueries * this->width_)) {}

  void operator()(int64_t pair, void* out, float* lse) {
    this->open(pair);
    out_ = static_cast<Bits*>(out);
    lse_ = lse;
    if (this->keys_ == 0) return write_nothing();
    const Attention& a = this->a_;
    this->by_panels(a.k, a.k_strides, 1, [&](int32_t j, const float* stage) {
      put_across(stage, this->width_, across_ + int64_t{j} * this->width_);
    });
    const Bits* const v = this->first(a.v, a.v_strides);
    for (int32_t j = 0; j < this->keys_; ++j) {
      read_row<Token>(v + this->visible_[j] * a.v_strides.token, this->entry(2), a.dim,
                      values_ + j * kPanel, this->key_panel());
    }
    const Cuts blocks(this->length_, most_queries(this->keys_));
    for (int32_t k = 0; k < blocks.count; ++k) block(blocks[k]);
  }

 private:
  // As many as keep a block of scores near, but enough for the products.
  static int32_t most_queries(int32_t keys) {
    const int32_t near = kMostScores / pitch_of(keys) / kTileRows * kTileRows;
    return near < 2 * kTileRows ? 2 * kTileRows : smaller(near, kMostQueries);
  }

  // For any number of keys up to n.
  static int64_t most_scores(int32_t n) {
    const int64_t fewest = int64_t{2 * kTileRows} * pitch_of(n);
    return fewest > kMostScores ? fewest : kMostScores;
  }

  void write_nothing() {
    for (int32_t i = 0; i < this->length_; ++i) {
      this->write_zeros(out_ + this->out_element(i));
      if (lse_ != nullptr) lse_[this->lse_element(i)] = __builtin_inff();
    }
  }

  void block(const Part& queries) {
    const Attention& a = this->a_;
    const int32_t width = this->width_, keys = this->keys_, pitch = pitch_of(keys);
    const Bits* const q = this->first(a.q, a.q_strides);
    for (int32_t i = 0; i < queries.size; ++i) {
      read_row<Token>(q + (queries.begin + i) * a.q_strides.token, this->entry(0), a.dim,
                      queries_ + i * width);
    }
    multiply(Product{queries_, width, across_, int64_t{kPanel} * width, scores_, pitch, queries.size,
                     round_up(keys, kVectorFloats) / kVectorFloats, a.dim, false});
    softmax(queries);
    for (int32_t j = 0; j < keys; j += kSummedKeys) {
      multiply(Product{scores_ + j, pitch, values_ + j * kPanel, this->key_panel(), outs_, width,
                       queries.size, width / kVectorFloats, smaller(keys - j, kSummedKeys), j > 0});
    }
    for (int32_t i = 0; i < queries.size; ++i) {
      this->write_row(outs_ + i * width, inverse_[i], out_ + this->out_element(queries.begin + i));
    }
  }

  // A row of scores becomes exp(score - the largest); their sum's inverse is kept. One step after
  // the other for all rows, so that a row need not wait for what the one before folds.
  void softmax(const Part& queries) {
    const int32_t keys = this->keys_, end = round_up(keys, kVectorFloats), pitch = pitch_of(keys);
    float most[kMostQueries], sum[kMostQueries];
    for (int32_t i = 0; i < queries.size; ++i) {
      float* const row = scores_ + i * pitch;
      for (int32_t j = keys; j < end; ++j) row[j] = -__builtin_inff();
      most[i] = largest(row, end);
    }
    for (int32_t i = 0; i < queries.size; ++i) {
      float* const row = scores_ + i * pitch;
      Vector sums{};
      for (int32_t j = 0; j < end; j += kVectorFloats) {
        sums += vector_at(row + j) = exponential(vector_at(row + j) - most[i]);
      }
      sum[i] = sum_of(sums);
    }
    for (int32_t i = 0; i < queries.size; ++i) {
      inverse_[i] = 1 / sum[i];
      if (lse_ == nullptr) continue;
      lse_[this->lse_element(queries.begin + i)] = most[i] + __builtin_logf(sum[i]);
    }
  }
  static float largest(const float* row, int32_t end) {
    Vector mosts = vector_at(row);
    for (int32_t j = kVectorFloats; j < end; j += kVectorFloats) {
      mosts = mosts > vector_at(row + j) ? mosts : vector_at(row + j);
    }
    return most_of(mosts);
  }

  float* across_;   // keys, in panels [width][kPanel]
  float* values_;   // v, in panels [n_max][kPanel]
  float* queries_;  // [., width] times scale
  float* scores_;   // [., pitch_of(keys)]
  float* outs_;     // [., width]
  float inverse_[kMostQueries];
  Bits* out_ = nullptr;
  float* lse_ = nullptr;
};

template <typename Token>
class Backward : Head<Token> {
 public:
  using Base = Head<Token>;
  using typename Base::Bits;

  Backward(Parts& parts, const Attention& a, const AttentionGradient& g)
      : Base(parts, a),
        g_(g),
        keys_across_(parts.take<float>(this->across_size())),
        values_across_(parts.take<float>(this->across_size())),
        key_panels_(parts.take<float>(this->panels_ * this->key_panel())),
        dk_(parts.take<float>(int64_t{a.n_max} * this->width_)),
        dv_(parts.take<float>(int64_t{a.n_max} * this->width_)),
        queries_(parts, *this),
        grads_(parts, *this),
        p_(parts.take<float>(kMostQueries * pitch_of(smaller(a.n_max, kMostKeys)))),
        ds_(parts.take<float>(kMostQueries * pitch_of(smaller(a.n_max, kMostKeys)))),
        dq_(parts.take<float>(kMostQueries * this->width_)),
        zeros_(parts.take<float>(this->width_)),
        out_(parts.take<float>(this->width_)) {
    if (zeros_ != nullptr) std::memset(zeros_, 0, size_t(this->width_) * sizeof(float));
  }

  void operator()(int64_t pair) {
    this->open(pair);
    const Attention& a = this->a_;
    this->by_panels(a.k, a.k_strides, 1, [&](int32_t j, const float* stage) {
      put_across(stage, this->width_, keys_across_ + int64_t{j} * this->width_);
      this->put_keys(stage, j, key_panels_);
    });
    this->by_panels(a.v, a.v_strides, 2, [&](int32_t j, const float* stage) {
      put_across(stage, this->width_, values_across_ + int64_t{j} * this->width_);
    });
    const Cuts blocks(this->length_, kMostQueries);
    for (int32_t k = 0; k < blocks.count; ++k) block(blocks[k], k > 0);
    write_keys(dk_, g_.dk, g_.dk_strides);
    write_keys(dv_, g_.dv, g_.dv_strides);
  }

 private:
  // A block of queries, or of their gradients, as the left and as the right side of a product.
  struct Block {
    float *rows, *panels;
    Block(Parts& parts, const Backward& head)
        : rows(parts.take<float>(kMostQueries * head.width_)),
          panels(parts.take<float>(head.panels_ * kMostQueries * kPanel)) {}
    void put(int32_t i, int32_t width) const {
      put_in_panels(rows + i * width, width, kMostQueries * kPanel, panels + i * kPanel);
    }
  };

  void block(const Part& queries, bool later) {
    const Attention& a = this->a_;
    if (this->keys_ == 0) {
      std::memset(dq_, 0, size_t(queries.size) * this->width_ * sizeof(float));
    } else {
      read_block(queries);
    }
    for (int32_t j = 0; j < this->keys_; j += kMostKeys) {
      step(queries.size, Part{j, smaller(this->keys_ - j, kMostKeys)}, later);
    }
    Bits* const dq = static_cast<Bits*>(g_.dq) + a.first_element(g_.dq_strides, this->b_, this->h_);
    for (int32_t i = 0; i < queries.size; ++i) {
      this->write_row(dq_ + i * this->width_, a.scale,
                      dq + (queries.begin + i) * g_.dq_strides.token);
    }
  }

  void read_block(const Part& queries) {
    const Attention& a = this->a_;
    const int32_t width = this->width_;
    const Bits* const q = this->first(a.q, a.q_strides);
    const Entry plain{zeros_, 1.0f};
    for (int32_t i = 0; i < queries.size; ++i) {
      const int32_t query = queries.begin + i;
      const int64_t at = this->out_element(query);
      float* const grad = grads_.rows + i * width;
      read_row<Token>(q + query * a.q_strides.token, this->entry(0), a.dim,
                      queries_.rows + i * width);
      read_row<Token>(static_cast<const Bits*>(g_.grad_out) + at, plain, a.dim, grad);
      read_row<Token>(static_cast<const Bits*>(g_.out) + at, plain, a.dim, out_);
      queries_.put(i, width);
      grads_.put(i, width);
      Vector products{};
      for (int32_t d = 0; d < width; d += kVectorFloats) {
        products += vector_at(grad + d) * vector_at(out_ + d);
      }
      delta_[i] = sum_of(products);
      lse_[i] = g_.lse[this->lse_element(query)];
    }
  }

  // What a block of queries and some of the keys give each other.
  void step(int32_t queries, const Part& keys, bool later) {
    const int32_t width = this->width_, dim = this->a_.dim, pitch = pitch_of(keys.size);
    const int32_t row_vectors = width / kVectorFloats;
    const int32_t key_vectors = (keys.size + kVectorFloats - 1) / kVectorFloats;
    const int64_t across = int64_t{keys.begin} * width, row = across;
    const int64_t panel = int64_t{kPanel} * width, block_panel = kMostQueries * kPanel;
    multiply({queries_.rows, width, keys_across_ + across, panel, p_, pitch, queries, key_vectors,
              dim, false});
    multiply({grads_.rows, width, values_across_ + across, panel, ds_, pitch, queries, key_vectors,
              dim, false});
    for (int32_t i = 0; i < queries; ++i) differentiate(i, key_vectors, pitch);
    multiply_across({p_, pitch, grads_.panels, block_panel, dv_ + row, width, keys.size,
                     row_vectors, queries, later});
    multiply_across({ds_, pitch, queries_.panels, block_panel, dk_ + row, width, keys.size,
                     row_vectors, queries, later});
    multiply({ds_, pitch, key_panels_ + int64_t{keys.begin} * kPanel, this->key_panel(), dq_, width,
              queries, row_vectors, keys.size, keys.begin > 0});
  }

  // Scores and do . v of a query become p and ds / scale.
  void differentiate(int32_t i, int32_t vectors, int32_t pitch) {
    float* const p = p_ + i * pitch;
    float* const ds = ds_ + i * pitch;
    for (int32_t j = 0; j < vectors * kVectorFloats; j += kVectorFloats) {
      const Vector weight = exponential(vector_at(p + j) - lse_[i]);
      vector_at(p + j) = weight;
      vector_at(ds + j) = weight * (vector_at(ds + j) - delta_[i]);
    }
  }

  void write_keys(const float* rows, void* gradient, const Strides& s) const {
    Bits* const to =
        static_cast<Bits*>(gradient) + this->a_.first_element(s, this->b_, this->h_);
    int32_t next = 0;
    for (int32_t j = 0; j < this->length_; ++j) {
      if (next < this->keys_ && this->visible_[next] == j) {
        this->write_row(rows + int64_t{next++} * this->width_, 1.0f, to + j * s.token);
      } else {
        this->write_zeros(to + j * s.token);
      }
    }
  }

  const AttentionGradient& g_;
  float *keys_across_, *values_across_;  // in panels [width][kPanel]
  float* key_panels_;                    // in panels [n_max][kPanel]
  float *dk_, *dv_;                      // [n_max, width]
  Block queries_, grads_;
  float *p_, *ds_;  // [., pitch_of(keys of a step)]
  float* dq_;       // [., width], without scale
  float *zeros_, *out_;
  float delta_[kMostQueries], lse_[kMostQueries];
};

bool serves(TokenType, int32_t) { return true; }

void forward(const Attention& a, int64_t begin, int64_t end, void* out, float* lse) {
  with_type(a.type, out, [&](auto token, auto*) {
    Parts counted(nullptr);
    Forward<decltype(token)>(counted, a);
    Parts parts(thread_scratch(counted.used()));
    Forward<decltype(token)> head(parts, a);
    for (int64_t pair = begin; pair < end; ++pair) head(pair, out, lse);
  });
}

void backward(const Attention& a, const AttentionGradient& g, int64_t begin, int64_t end) {
  with_type(a.type, g.dq, [&](auto token, auto*) {
    Parts counted(nullptr);
    Backward<decltype(token)>(counted, a, g);
    Parts parts(thread_scratch(counted.used()));
    Backward<decltype(token)> head(parts, a, g);
    for (int64_t pair = begin; pair < end; ++pair) head(pair);
  });
}

}  // namespace

const AttentionKernels attention_kernels{serves, forward, backward};

}  // namespace SPCXR_ISA
}  // namespace spcxr
