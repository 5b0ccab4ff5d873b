// The attention on tiles against the truth of attention_calls.h. Compiled once for each
// SPCXR_TILE_ISA: `emulated` runs the kernels' code on the instructions of tile_emulation.h,
// without an argument on those of this CPU; 77 when it lacks them.
#define SPCXR_ISA emulated
#include "tile_emulation.h"

#include SPCXR_TILE_OPS

#include "cpu/attention_tiles_body.h"

#include <cstdio>
#include <memory>
#include <thread>

#include "attention_calls.h"
#include "tile_isa.h"

#define CHECK(held)                                                                 \
  do {                                                                              \
    if (!(held)) {                                                                  \
      std::fprintf(stderr, "%s:%d: %s (case %d)\n", __FILE__, __LINE__, #held,       \
                   g_case);                                                         \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (0)

using namespace spcxr;

namespace {

int g_case = 0;

uint16_t bits16(float value) { return static_cast<uint16_t>(float_to_bits(value) >> 16); }
double value_of(uint16_t bits) { return bits_to_float(uint32_t{bits} << 16); }

// Exactly so many elements, an odd number of them past a multiple of 64 bytes, at first NaN: a
// sanitizer sees what is read before or after.
template <typename T>
struct Memory {
  explicit Memory(int64_t n) : count(n), bytes(new T[size_t(n) + 1]) {
    std::memset(static_cast<void*>(bytes.get()), 0xFF, (size_t(n) + 1) * sizeof(T));
  }
  T* data() const { return bytes.get() + 1; }
  bool operator==(const Memory& other) const {
    return std::memcmp(data(), other.data(), size_t(count) * sizeof(T)) == 0;
  }
  int64_t count;
  std::unique_ptr<T[]> bytes;
};

// Three tensors [total, heads, dim], side by side in each token's row or one after the other.
struct Three {
  Three(const AttentionCall& call)
      : width(int64_t{call.shape.heads} * call.shape.dim),
        pitch(call.shape.separate ? width : 3 * width),
        apart(call.shape.separate ? call.total * width : width),
        strides{call.shape.n_max * pitch, pitch, call.shape.dim},
        memory(3 * call.total * width) {}

  uint16_t* operator[](int which) const { return memory.data() + which * apart; }
  void fill(int which, const std::vector<float>& values) {
    for (size_t i = 0; i < values.size(); ++i) *at(which, int64_t(i)) = bits16(values[i]);
  }
  uint16_t* at(int which, int64_t i) const {
    return (*this)[which] + i / width * pitch + i % width;
  }

  int64_t width, pitch, apart;
  Strides strides;
  Memory<uint16_t> memory;
};

struct Results {
  explicit Results(const AttentionCall& call)
      : out(call.total * call.shape.heads * call.shape.dim),
        lse(call.total * call.shape.heads),
        gradients(call) {}
  bool operator==(const Results& other) const {
    return out == other.out && lse == other.lse && gradients.memory == other.gradients.memory;
  }
  Memory<uint16_t> out;
  Memory<float> lse;
  Three gradients;
};

class Run {
 public:
  Run(const AttentionKernels& kernels, const AttentionCall& call, float scale)
      : kernels_(kernels), qkv_(call), bias_(3 * qkv_.width), grad_out_(call.total * qkv_.width) {
    qkv_.fill(0, call.q);
    qkv_.fill(1, call.k);
    qkv_.fill(2, call.v);
    for (size_t i = 0; i < call.bias.size(); ++i) bias_.data()[i] = bits16(call.bias[i]);
    for (size_t i = 0; i < call.grad_out.size(); ++i) {
      grad_out_.data()[i] = bits16(call.grad_out[i]);
    }
    const AttentionShape& s = call.shape;
    a_ = {TokenType::kBFloat16, qkv_[0], qkv_[1], qkv_[2], qkv_.strides, qkv_.strides,
          qkv_.strides, s.bias ? bias_.data() : nullptr, s.masks ? call.key_bits.data() : nullptr,
          s.packed ? call.cu_seqlens.data() : nullptr, s.count, call.total, s.n_max, s.heads, s.dim,
          scale};
    CHECK(kernels.serves(a_.type, a_.dim));
  }

  int64_t pairs() const { return a_.count * a_.heads; }
  void operator()(int64_t begin, int64_t end, const Results& r, bool with_lse = true) const {
    kernels_.forward(a_, begin, end, r.out.data(), with_lse ? r.lse.data() : nullptr);
    if (!with_lse) return;
    const AttentionGradient g{r.out.data(), grad_out_.data(), r.lse.data(), r.gradients[0],
                              r.gradients[1], r.gradients[2], r.gradients.strides,
                              r.gradients.strides, r.gradients.strides};
    kernels_.backward(a_, g, begin, end);
  }

 private:
  const AttentionKernels& kernels_;
  Three qkv_;
  Memory<uint16_t> bias_, grad_out_;
  Attention a_;
};

// A call, and the errors that torch 2.13's scaled_dot_product_attention has on it in bfloat16: of
// out, dq, dk, dv.
struct Case {
  AttentionShape shape;
  double torch[4];
};

template <typename Value>
double error_of(const std::vector<double>& truth, const Value& value) {
  double wrong = 0, all = 1e-12;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double off = value(int64_t(i)) - truth[i];
    wrong += off * off;
    all += truth[i] * truth[i];
  }
  return std::sqrt(wrong / all);
}

void check_same_bits(const Run& run, const AttentionCall& call, const Results& whole) {
  const Results pieces(call), threads(call), without(call);
  for (int64_t pair = run.pairs() - 1; pair >= 0; --pair) run(pair, pair + 1, pieces);
  CHECK(pieces == whole);
  const int64_t half = run.pairs() / 2;
  std::thread other([&] { run(0, half, threads); });
  run(half, run.pairs(), threads);
  other.join();
  CHECK(threads == whole);
  run(0, run.pairs(), without, false);
  CHECK(without.out == whole.out);
}

void check_lse(const AttentionTruth& truth, const Results& results, const AttentionShape& shape) {
  for (size_t i = 0; i < truth.lse.size(); ++i) {
    const double right = truth.lse[i], lse = results.lse.data()[i];
    if (std::isinf(right)) {
      CHECK(lse == right);
      continue;
    }
    // q + bias is rounded to bfloat16.
    const double of_bias = shape.bias ? 0.01 * double{shape.size} * double{shape.size} : 0;
    CHECK(std::fabs(lse - right) <= 1e-5 + 3e-7 * std::fabs(right) + of_bias);
  }
}

void check(const AttentionKernels& kernels, const Case& one) {
  const AttentionShape& shape = one.shape;
  const AttentionCall call = draw_attention(shape, uint64_t(1000 + g_case));
  const float size = 1 / std::sqrt(static_cast<float>(shape.dim));
  const float scale = g_case % 5 == 4 ? -size : size;
  const AttentionTruth truth = attention_truth(call, scale);
  const Run run(kernels, call, scale);
  const Results whole(call);
  run(0, run.pairs(), whole);
  check_same_bits(run, call, whole);
  check_lse(truth, whole, shape);
  const auto gradient = [&](int which) {
    return [&whole, which](int64_t i) { return value_of(*whole.gradients.at(which, i)); };
  };
  const double errors[4] = {
      error_of(truth.out, [&](int64_t i) { return value_of(whole.out.data()[i]); }),
      error_of(truth.dq, gradient(0)), error_of(truth.dk, gradient(1)),
      error_of(truth.dv, gradient(2))};
  for (int i = 0; i < 4; ++i) CHECK(errors[i] <= std::max(1.5 * one.torch[i], 1e-3));
}

// Scratch holds what was left in it: NaN at worst.
void poison_scratch() {
  constexpr size_t kBytes = size_t{8} << 20;
  std::memset(thread_scratch(kBytes), 0xFF, kBytes);
}

}  // namespace

int main(int argc, char** argv) {
  const bool emulated = asks_for_emulation(argc, argv);
  if (!emulated && lacks_tiles()) return kSkipped;
  const AttentionKernels& kernels =
      emulated ? spcxr::emulated::attention_kernels : spcxr::SPCXR_TILE_ISA::attention_kernels;
  CHECK(kernels.serves(TokenType::kBFloat16, 96) && !kernels.serves(TokenType::kBFloat16, 48));
  CHECK(!kernels.serves(TokenType::kFloat16, 64) && !kernels.serves(TokenType::kBFloat16, 160));
  const Case cases[] = {
      // n_max, heads, dim, count, packed, masks, bias, separate, size
      {{0, 2, 64, 3, false, true, true, false, 1}, {0, 0, 0, 0}},
      {{1, 1, 32, 1, false, false, false, true, 1}, {0, 0, 0, 0}},
      {{5, 2, 64, 2, false, false, false, false, 1}, {1.8e-03, 2.8e-03, 3.0e-03, 2.2e-03}},
      {{16, 3, 32, 2, true, false, true, true, 1}, {2.4e-03, 5.4e-03, 4.7e-03, 3.2e-03}},
      {{17, 1, 64, 3, false, true, true, true, 1}, {2.9e-03, 4.7e-03, 4.2e-03, 3.3e-03}},
      {{31, 1, 128, 6, false, true, false, true, 1}, {2.0e-03, 2.6e-03, 2.6e-03, 2.3e-03}},
      {{32, 2, 64, 3, true, true, false, false, 1}, {1.4e-03, 4.8e-03, 4.4e-03, 2.1e-03}},
      {{33, 2, 96, 2, false, true, false, false, 1}, {2.1e-03, 2.5e-03, 3.0e-03, 2.8e-03}},
      {{50, 2, 64, 3, false, true, false, false, 1}, {2.0e-03, 2.5e-03, 2.8e-03, 2.7e-03}},
      {{64, 1, 128, 2, false, false, true, false, 1}, {2.2e-03, 5.2e-03, 4.7e-03, 3.6e-03}},
      {{65, 2, 96, 3, true, true, true, true, 1}, {2.6e-03, 4.8e-03, 4.4e-03, 3.7e-03}},
      {{99, 2, 64, 3, true, true, true, false, 1}, {2.7e-03, 4.7e-03, 4.2e-03, 3.3e-03}},
      {{197, 1, 64, 1, false, false, false, false, 1}, {2.2e-03, 2.4e-03, 3.3e-03, 3.3e-03}},
      {{197, 1, 32, 4, true, true, false, true, 1}, {2.1e-03, 2.5e-03, 3.3e-03, 3.1e-03}},
      {{100, 1, 64, 2, false, false, false, false, 10}, {6.0e-04, 8.9e-03, 1.0e-02, 1.8e-03}},
      {{100, 1, 64, 3, false, true, false, false, 100}, {9.0e-08, 1.2e+00, 1.2e+00, 1.8e-03}},
      {{100, 1, 64, 2, false, false, true, false, 3}, {6.3e-03, 1.9e-02, 1.9e-02, 7.1e-03}},
      {{257, 1, 128, 1, false, false, false, false, 1}, {2.2e-03, 2.4e-03, 3.5e-03, 3.5e-03}},
      {{600, 1, 32, 1, false, false, false, true, 1}, {2.2e-03, 2.9e-03, 4.3e-03, 4.2e-03}},
  };
  for (const Case& one : cases) {
    poison_scratch();
    check(kernels, one);
    ++g_case;
  }
  std::printf("attention: ok, %s%s\n", kName, emulated ? ", emulated" : "");
}
