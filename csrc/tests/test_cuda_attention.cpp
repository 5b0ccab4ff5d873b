// The CUDA kernels of masked attention, thread by thread on the CPU, against the formulas of
// core/attention.h on random calls. Run by ctest. An argument is the seed.
#include "matrix_emulation.h"

#include <algorithm>
#include <cstdio>
#include <set>

#include "attention_calls.h"
#include "cuda/attention_forward.cuh"

#define CHECK(held)                                                               \
  do {                                                                            \
    if (!(held)) {                                                                \
      std::fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #held, what);  \
      std::exit(1);                                                               \
    }                                                                             \
  } while (0)

using namespace spcxr;

namespace {

char what[200] = "";  // the call that a failure names

BFloat16 rounded(float x, BFloat16) { return {to_bfloat16(x)}; }
Float16 rounded(float x, Float16) { return {to_float16(x)}; }

// Exactly `count` elements of NaN, so that a sanitizer sees the first byte before or after.
template <class T>
struct Poisoned {
  std::unique_ptr<unsigned char[]> bytes;
  T* data;

  explicit Poisoned(size_t count)
      : bytes(new unsigned char[count * sizeof(T)]), data(reinterpret_cast<T*>(bytes.get())) {
    std::memset(bytes.get(), 0xFF, count * sizeof(T));
  }
};

// A call in tokens: q, k, v apart or in one [rows, 3, heads, dim], with rows to spare.
template <class Token>
struct Tokens {
  static constexpr int64_t kSpare = 3;  // rows past a packed batch
  std::vector<int32_t> cu_seqlens;
  Poisoned<Token> q, k, v, bias;
  std::vector<uint32_t> key_bits;
  Attention a{};

  Tokens(const AttentionCall& call, float scale)
      : cu_seqlens(call.cu_seqlens),
        q(rows(call) * width(call) * (call.shape.separate ? 1 : 3)),
        k(call.shape.separate ? rows(call) * width(call) : 0),
        v(call.shape.separate ? rows(call) * width(call) : 0),
        bias(call.bias.size()),
        key_bits(call.key_bits) {
    const auto& s = call.shape;
    const int64_t w = width(call), token = s.separate ? w : 3 * w;
    const Strides strides{s.n_max * token, token, s.dim};
    Token* k_first = s.separate ? k.data : q.data + w;
    Token* v_first = s.separate ? v.data : q.data + 2 * w;
    fill(call.q, w, q.data, token), fill(call.k, w, k_first, token);
    fill(call.v, w, v_first, token), fill(call.bias, 1, bias.data, 1);
    a = Attention{sizeof(unpack(Token{})) && std::is_same_v<Token, BFloat16>
                      ? TokenType::kBFloat16
                      : TokenType::kFloat16,
                  q.data, k_first, v_first, strides, strides, strides,
                  s.bias ? bias.data : nullptr, s.masks ? key_bits.data() : nullptr,
                  s.packed ? cu_seqlens.data() : nullptr, s.count, rows(call), s.n_max, s.heads,
                  s.dim, scale};
  }
  static int64_t rows(const AttentionCall& call) {
    return call.total + (call.shape.packed ? kSpare : 0);
  }
  static int64_t width(const AttentionCall& call) {
    return int64_t{call.shape.heads} * call.shape.dim;
  }
  static void fill(const std::vector<float>& from, int64_t width, Token* to, int64_t stride) {
    for (size_t i = 0; i < from.size(); ++i) {
      to[static_cast<int64_t>(i) / width * stride + static_cast<int64_t>(i) % width] =
          rounded(from[i], Token{});
    }
  }
};

unsigned grid(const Attention& a, int32_t warps) {
  const int64_t teams = kAttentionWarps / warps;
  return static_cast<unsigned>((a.count * a.heads + teams - 1) / teams);
}

// Whether it trapped.
template <class Token>
bool run_forward(const Attention& a, Token* out, float* lse) {
  const int32_t warps = forward_warps(a.n_max);
  const auto body = [&] {
    if (a.dim == 32) return attention_forward_kernel<Token, 32>(a, warps, out, lse);
    if (a.dim == 64) return attention_forward_kernel<Token, 64>(a, warps, out, lse);
    attention_forward_kernel<Token, 128>(a, warps, out, lse);
  };
  const size_t bytes = forward_bytes(a.n_max, a.dim) * (kAttentionWarps / warps);
  return emulated::traps(grid(a, warps), kAttentionThreads, body, bytes);
}

// The root of the mean square error and the worst, against the root of the mean square.
struct Error {
  double squares = 0, errors = 0, worst = 0;

  void see(double value, double truth) {
    squares += truth * truth;
    errors += (value - truth) * (value - truth);
    worst = std::isnan(value) ? INFINITY : std::max(worst, std::fabs(value - truth));
  }
};

template <class Token>
constexpr double kStep = std::is_same_v<Token, BFloat16> ? 1 / 256.0 : 1 / 2048.0;

template <class Token>
void test(const AttentionShape& shape, float scale, uint64_t seed) {
  const AttentionCall call = draw_attention(shape, seed);
  std::snprintf(what, sizeof what,
                "N %d heads %d dim %d B %d packed %d masks %d bias %d separate %d size %g scale %g"
                " type %d seed %d",
                shape.n_max, shape.heads, shape.dim, static_cast<int>(shape.count), shape.packed,
                shape.masks, shape.bias, shape.separate, shape.size, scale,
                std::is_same_v<Token, BFloat16>, static_cast<int>(seed));
  const AttentionTruth truth = attention_truth(call, scale);
  const Tokens<Token> tokens(call, scale);
  const Attention& a = tokens.a;
  const int64_t width = tokens.width(call);
  Poisoned<Token> out(a.total * width), again(a.total * width);
  Poisoned<float> lse(a.total * a.heads);
  CHECK(!run_forward(a, out.data, lse.data));
  CHECK(!run_forward(a, again.data, static_cast<float*>(nullptr)));
  CHECK(std::memcmp(out.data, again.data, a.total * width * 2) == 0);
  Error error;
  for (int64_t i = 0; i < a.total * width; ++i) {
    const bool here = i < call.total * width;
    if (!here) CHECK(out.data[i].bits == 0);
    if (here) error.see(unpack(out.data[i]), truth.out[i]);
  }
  for (int32_t h = 0; h < a.heads; ++h) {
    for (int64_t row = 0; row < call.total; ++row) {
      const double value = lse.data[h * a.total + row], goal = truth.lse[h * call.total + row];
      if (std::isinf(goal)) CHECK(value == goal);
      if (!std::isinf(goal)) CHECK(std::fabs(value - goal) < 1e-4 * (1 + std::fabs(goal)) + 0.1);
    }
  }
  std::printf("%s: out %.3g worst %.3g\n", what, std::sqrt(error.errors / (error.squares + 1e-9)) / kStep<Token>,
              error.worst / kStep<Token>);
}

}  // namespace

int main() {
  test<BFloat16>({17, 2, 32, 2, false, false, false, false, 1}, 0.2f, 1);
  test<Float16>({17, 2, 32, 2, false, false, false, false, 1}, 0.2f, 1);
  test<BFloat16>({70, 1, 64, 2, true, true, true, false, 1}, 0.125f, 2);
  test<Float16>({70, 1, 64, 2, true, true, true, true, 1}, -0.125f, 2);
  test<Float16>({40, 3, 128, 2, true, true, true, true, 1}, 0.1f, 5);
  test<BFloat16>({33, 3, 64, 3, true, true, false, true, 100}, 0.1f, 5);
  std::puts("emulated CUDA attention");
}
