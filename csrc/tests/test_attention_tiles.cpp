// The attention on tiles against the truth of attention_calls.h. Compiled once for each of
// SPCXR_TILE_ISA: `emulated` runs the kernels' code on the instructions of tile_emulation.h, without
// an argument those of this CPU; 77 when it lacks them.
#define SPCXR_ISA emulated
#include "tile_emulation.h"

#include SPCXR_TILE_OPS

#include "cpu/attention_tiles_body.h"

#include <cstdio>
#include <memory>
#include <thread>

#include "attention_calls.h"

#define CHECK(held)                                                                 \
  do {                                                                              \
    if (!(held)) {                                                                  \
      std::fprintf(stderr, "%s:%d: %s (shape %d)\n", __FILE__, __LINE__, #held, g_shape); \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (0)

using namespace spcxr;

namespace {

int g_shape = 0;

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
  uint16_t* at(int which, int64_t i) const { return (*this)[which] + i / width * pitch + i % width; }

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

template <typename Value>
double error_of(const std::vector<double>& truth, const Value& value) {
  double wrong = 0, all = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double off = value(int64_t(i)) - truth[i];
    wrong += off * off;
    all += truth[i] * truth[i];
  }
  return wrong == 0 ? 0 : std::sqrt(wrong / all);
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

void check(const AttentionKernels& kernels, const AttentionShape& shape, uint64_t seed) {
  const AttentionCall call = draw_attention(shape, seed);
  const float scale = 1 / std::sqrt(static_cast<float>(shape.dim));
  const AttentionTruth truth = attention_truth(call, scale);
  const Run run(kernels, call, scale);
  const Results whole(call);
  run(0, run.pairs(), whole);
  check_same_bits(run, call, whole);
  double lse_error = 0;
  for (size_t i = 0; i < truth.lse.size(); ++i) {
    const double lse = whole.lse.data()[i];
    if (std::isinf(truth.lse[i])) CHECK(lse == truth.lse[i]);
    if (!std::isinf(truth.lse[i])) lse_error = std::max(lse_error, std::fabs(lse - truth.lse[i]));
  }
  const auto gradient = [&](int which) {
    return [&whole, which](int64_t i) { return value_of(*whole.gradients.at(which, i)); };
  };
  const double out =
      error_of(truth.out, [&](int64_t i) { return value_of(whole.out.data()[i]); });
  const double dq = error_of(truth.dq, gradient(0)), dk = error_of(truth.dk, gradient(1)),
               dv = error_of(truth.dv, gradient(2));
  std::printf("%d n %d dim %d size %g: out %.2e dq %.2e dk %.2e dv %.2e lse %.2e\n", g_shape, shape.n_max,
              shape.dim, shape.size, out, dq, dk, dv, lse_error);
}

#define SPCXR_NAME_(isa) #isa
#define SPCXR_NAME(isa) SPCXR_NAME_(isa)
constexpr const char* kName = SPCXR_NAME(SPCXR_TILE_ISA);

bool native() {
  const bool lanes = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return lanes && (std::strcmp(kName, "amx") != 0 || amx::permitted());
}

}  // namespace

int main(int argc, char** argv) {
  const bool emulated = argc > 1 && std::strcmp(argv[1], "emulated") == 0;
  if (!emulated && !native()) {
    std::printf("skipped: this CPU or its system does not give %s\n", kName);
    return 77;
  }
  const AttentionKernels& kernels =
      emulated ? spcxr::emulated::attention_kernels : spcxr::SPCXR_TILE_ISA::attention_kernels;
  const AttentionShape shapes[] = {
      // n_max, heads, dim, count, packed, masks, bias, separate, size
      {1, 1, 32, 1, false, false, false, true, 1},
      {5, 2, 64, 2, false, false, false, false, 1},
      {17, 1, 64, 3, false, true, true, true, 1},
      {33, 2, 96, 2, false, true, false, false, 1},
      {50, 2, 64, 3, false, true, false, false, 1},
      {64, 1, 128, 2, false, false, true, false, 1},
      {99, 2, 64, 3, true, true, true, false, 1},
      {197, 1, 64, 1, false, false, false, false, 1},
      {197, 1, 32, 4, true, true, false, true, 1},
      {100, 1, 64, 2, false, false, false, false, 10},
      {100, 1, 64, 2, false, true, false, false, 100},
      {100, 1, 64, 2, false, false, true, false, 3},
      {300, 1, 64, 1, false, false, false, false, 1},
  };
  for (const AttentionShape& shape : shapes) {
    check(kernels, shape, 1000 + g_shape);
    ++g_shape;
  }
}
