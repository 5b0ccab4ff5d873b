// Masked attention in float arithmetic, forward and backward, in namespace SPCXR_ISA: the
// including file names it, CMake gives its compiler flags. For one head of one sequence, the keys
// that are not masked are laid side by side once; then block by block of queries: scores, softmax,
// products. What is inline in a header must not leave this object file, as in kernels_body.h.
#define SPCXR_HD inline __attribute__((always_inline))

#include "cpu/attention.h"

#include "cpu/attention_head.h"
#include "cpu/kernels.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

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
        scores_(parts.take<float>(most_scores(a.n_max, kNearScores))),
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
    const Cuts blocks(this->length_, most_queries(this->keys_, kNearScores));
    for (int32_t k = 0; k < blocks.count; ++k) block(blocks[k]);
  }

 private:
  void write_nothing() {
    for (int32_t i = 0; i < this->length_; ++i) {
      this->write_zeros(out_ + this->out_element(i));
      if (lse_ != nullptr) lse_[this->lse_element(i)] = __builtin_inff();
    }
  }

  void block(const Part& queries) {
    const Attention& a = this->a_;
    const int32_t width = this->width_;
    const Bits* const q = this->first(a.q, a.q_strides);
    for (int32_t i = 0; i < queries.size; ++i) {
      read_row<Token>(q + (queries.begin + i) * a.q_strides.token, this->entry(0), a.dim,
                      queries_ + i * width);
    }
    this->multiply_keys(queries_, queries.size, across_, scores_);
    softmax(queries);
    this->multiply_scores(scores_, queries.size, values_, outs_);
    for (int32_t i = 0; i < queries.size; ++i) {
      this->write_row(outs_ + i * width, inverse_[i], out_ + this->out_element(queries.begin + i));
    }
  }

  // A row of scores becomes exp(size * (score - the largest)); their sum's inverse is kept. One
  // step after the other for all rows, so that none waits for what the row before it folds.
  void softmax(const Part& queries) {
    const int32_t end = this->end(), pitch = pitch_of(this->keys_);
    const float size = this->size();
    float most[kMostQueries], sum[kMostQueries];
    for (int32_t i = 0; i < queries.size; ++i) {
      float* const row = scores_ + i * pitch;
      this->shut(row);
      most[i] = largest(row, end);
    }
    for (int32_t i = 0; i < queries.size; ++i) {
      float* const row = scores_ + i * pitch;
      Vector sums{};
      for (int32_t j = 0; j < end; j += kVectorFloats) {
        sums += vector_at(row + j) = exponential((vector_at(row + j) - most[i]) * size);
      }
      sum[i] = sum_of(sums);
    }
    for (int32_t i = 0; i < queries.size; ++i) {
      inverse_[i] = 1 / sum[i];
      if (lse_ == nullptr) continue;
      lse_[this->lse_element(queries.begin + i)] = most[i] * size + __builtin_logf(sum[i]);
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
  float* queries_;  // [., width]
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
        p_(parts.take<float>(most_scores(a.n_max, kFarScores))),
        ds_(parts.take<float>(most_scores(a.n_max, kFarScores))),
        dq_(parts.take<float>(kMostQueries * this->width_)),
        zeros_(parts.take<float>(this->width_)) {
    if (zeros_ != nullptr) std::memset(zeros_, 0, size_t(this->width_) * sizeof(float));
  }

  void operator()(int64_t pair) {
    this->open(pair);
    const Attention& a = this->a_;
    if (this->keys_ == 0) return write_nothing();
    this->by_panels(a.k, a.k_strides, 1, [&](int32_t j, const float* stage) {
      put_across(stage, this->width_, keys_across_ + int64_t{j} * this->width_);
      this->put_keys(stage, j, key_panels_);
    });
    this->by_panels(a.v, a.v_strides, 2, [&](int32_t j, const float* stage) {
      put_across(stage, this->width_, values_across_ + int64_t{j} * this->width_);
    });
    const Cuts blocks(this->length_, most_queries(this->keys_, kFarScores));
    for (int32_t k = 0; k < blocks.count; ++k) block(blocks[k], k > 0);
    write_keys(dk_, this->size(), g_.dk, g_.dk_strides);
    write_keys(dv_, 1.0f, g_.dv, g_.dv_strides);
  }

 private:
  Bits* dq_row(int32_t i) const {
    return static_cast<Bits*>(g_.dq) + this->a_.first_element(g_.dq_strides, this->b_, this->h_) +
           i * g_.dq_strides.token;
  }
  void write_nothing() const {
    for (int32_t i = 0; i < this->length_; ++i) this->write_zeros(dq_row(i));
    write_keys(nullptr, 0, g_.dk, g_.dk_strides);
    write_keys(nullptr, 0, g_.dv, g_.dv_strides);
  }

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
    const int32_t width = this->width_, keys = this->keys_, pitch = pitch_of(keys);
    const int32_t vectors = width / kVectorFloats, panel = kMostQueries * kPanel;
    read_block(queries);
    this->multiply_keys(queries_.rows, queries.size, keys_across_, p_);
    this->multiply_keys(grads_.rows, queries.size, values_across_, ds_);
    for (int32_t i = 0; i < queries.size; ++i) {
      differentiate(p_ + i * pitch, ds_ + i * pitch, g_.lse[this->lse_element(queries.begin + i)]);
    }
    const auto add = [&](const float* scores, const Block& right, float* sum) {
      for (int32_t i = 0; i < queries.size; i += kMostSummed) {
        multiply_across({scores + i * pitch, pitch, right.panels + i * kPanel, panel, sum, width,
                         keys, vectors, smaller(queries.size - i, kMostSummed), later || i > 0});
      }
    };
    add(p_, grads_, dv_);
    add(ds_, queries_, dk_);
    this->multiply_scores(ds_, queries.size, key_panels_, dq_);
    for (int32_t i = 0; i < queries.size; ++i) {
      this->write_row(dq_ + i * width, this->a_.scale, dq_row(queries.begin + i));
    }
  }

  void read_block(const Part& queries) {
    const Attention& a = this->a_;
    const int32_t width = this->width_;
    const Bits* const q = this->first(a.q, a.q_strides);
    const Bits* const grad_out = static_cast<const Bits*>(g_.grad_out);
    const Entry plain{zeros_, 1.0f};
    for (int32_t i = 0; i < queries.size; ++i) {
      const int32_t query = queries.begin + i;
      read_row<Token>(q + query * a.q_strides.token, this->entry(0), a.dim,
                      queries_.rows + i * width);
      read_row<Token>(grad_out + this->out_element(query), plain, a.dim, grads_.rows + i * width);
      queries_.put(i, width);
      grads_.put(i, width);
    }
  }

  // A query's scores and do . v become p and ds / scale. do . out is taken as the mean of do . v,
  // for out was rounded; and by the sum of p, for lse was rounded too.
  void differentiate(float* p, float* ds, float lse) const {
    const int32_t end = this->end();
    const float size = this->size();
    Vector sums{}, products{};
    this->shut(p);
    for (int32_t j = 0; j < end; j += kVectorFloats) {
      const Vector weight = exponential(vector_at(p + j) * size - lse);
      vector_at(p + j) = weight;
      sums += weight;
      products += weight * vector_at(ds + j);
    }
    const float mean = sum_of(products) / sum_of(sums);
    for (int32_t j = 0; j < end; j += kVectorFloats) {
      vector_at(ds + j) = vector_at(p + j) * (vector_at(ds + j) - mean);
    }
  }

  void write_keys(const float* rows, float scale, void* gradient, const Strides& s) const {
    Bits* const to =
        static_cast<Bits*>(gradient) + this->a_.first_element(s, this->b_, this->h_);
    int32_t next = 0;
    for (int32_t j = 0; j < this->length_; ++j) {
      if (next < this->keys_ && this->visible_[next] == j) {
        this->write_row(rows + int64_t{next++} * this->width_, scale, to + j * s.token);
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
  float *p_, *ds_;  // [., pitch_of(keys)]
  float* dq_;       // [., width]
  float* zeros_;
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
