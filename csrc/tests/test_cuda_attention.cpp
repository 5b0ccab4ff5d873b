// The CUDA kernels of masked attention, thread by thread on the CPU, against the formulas of
// core/attention.h on random calls. Run by ctest. An argument is the seed.
#include "matrix_emulation.h"

#include <algorithm>
#include <cstdio>
#include <set>

#include "attention_calls.h"
#include "cuda/attention_backward.cuh"
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
    a = Attention{std::is_same_v<Token, BFloat16> ? TokenType::kBFloat16 : TokenType::kFloat16,
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

template <class Token, class Kernel>
bool traps(const Attention& a, int32_t warps, int32_t bytes, const Kernel& kernel) {
  const auto body = [&] {
    if (a.dim == 32) return kernel(std::integral_constant<int, 32>{});
    if (a.dim == 64) return kernel(std::integral_constant<int, 64>{});
    kernel(std::integral_constant<int, 128>{});
  };
  return emulated::traps(static_cast<unsigned>(a.count * a.heads), warps * 32, body, bytes);
}

template <class Token>
bool forward_traps(const Attention& a, Token* out, float* lse) {
  return traps<Token>(a, forward_warps(a.n_max), forward_bytes(a.n_max, a.dim), [&](auto dim) {
    attention_forward_kernel<Token, decltype(dim)::value>(a, out, lse);
  });
}

template <class Token>
bool backward_traps(const Attention& a, const AttentionGradient& g) {
  return traps<Token>(a, backward_warps(a.n_max), backward_bytes(a.n_max, a.dim), [&](auto dim) {
    attention_backward_kernel<Token, decltype(dim)::value>(a, g);
  });
}

// One array against its truth in steps of the type: the root of the mean square error against that
// of the truth and of what its sums may cancel from.
template <class Token>
struct Error {
  double squares = 0, errors = 0;

  void see(Token token, double truth, double cancels = 0) {
    const double value = unpack(token);
    squares += truth * truth + cancels * cancels;
    errors += std::isfinite(value) ? (value - truth) * (value - truth) : INFINITY;
  }
  double steps() const {
    constexpr double step = std::is_same_v<Token, BFloat16> ? 1 / 256.0 : 1 / 2048.0;
    return std::sqrt(errors / (squares + 1e-30)) / step;
  }
};

// What a call gives. dq lies in rows of three, of which one is written.
template <class Token>
struct Outputs {
  int64_t width, size;
  Poisoned<Token> out, dq, dk, dv;
  Poisoned<float> lse;

  Outputs(const Attention& a, int64_t width)
      : width(width), size(a.total * width), out(size), dq(3 * size), dk(size), dv(size),
        lse(a.total * a.heads) {}

  AttentionGradient gradient(const Attention& a, const Token* grad_out) const {
    const Strides rows{a.n_max * width, width, a.dim}, three{3 * rows.batch, 3 * width, a.dim};
    return {out.data, grad_out, lse.data, dq.data, dk.data, dv.data, three, rows, rows};
  }
  void run(const Attention& a, const Token* grad_out) {
    CHECK(!forward_traps(a, out.data, lse.data));
    CHECK(!backward_traps<Token>(a, gradient(a, grad_out)));
  }
  Token query(int64_t i) const { return dq.data[i / width * 3 * width + i % width]; }
  bool same_bits(const Outputs& other) const {
    return std::memcmp(out.data, other.out.data, size * 2) == 0 &&
           std::memcmp(dq.data, other.dq.data, 3 * size * 2) == 0 &&
           std::memcmp(dk.data, other.dk.data, size * 2) == 0 &&
           std::memcmp(dv.data, other.dv.data, size * 2) == 0;
  }
};

template <class Token>
void check_lse(const AttentionCall& call, const Attention& a, const AttentionTruth& truth,
               const float* lse) {
  // A bias of q is added in the token's type, and moves scores by as much as they are rounded.
  const double allowed = call.shape.bias ? 3e-2 : 1e-6 * call.shape.size;
  for (int32_t h = 0; h < a.heads; ++h) {
    for (int64_t row = 0; row < a.total; ++row) {
      const double value = lse[h * a.total + row];
      const double goal = row < call.total ? truth.lse[h * call.total + row] : 0;
      CHECK(value == goal || std::fabs(value - goal) <= allowed * (1 + std::fabs(goal)));
    }
  }
}

template <class Token>
void check(const AttentionCall& call, const Attention& a, const AttentionTruth& truth,
           const Outputs<Token>& made) {
  Error<Token> out, dq, dk, dv;
  const auto& s = call.shape;
  const double likely = s.size > 1 ? 1 : 1.0 / s.n_max;  // the probability of a key
  const double cancels = std::fabs(a.scale) * s.size * std::sqrt(s.dim) * likely;
  for (int64_t i = 0; i < made.size; ++i) {
    if (i >= call.total * made.width) {
      CHECK((made.out.data[i].bits | made.query(i).bits) == 0);
      CHECK((made.dk.data[i].bits | made.dv.data[i].bits) == 0);
      continue;
    }
    out.see(made.out.data[i], truth.out[i]), dq.see(made.query(i), truth.dq[i], cancels);
    dk.see(made.dk.data[i], truth.dk[i], cancels), dv.see(made.dv.data[i], truth.dv[i]);
  }
  const double most = std::max({out.steps(), dq.steps(), dk.steps(), dv.steps()});
  CHECK(most <= 2);
  check_lse<Token>(call, a, truth, made.lse.data);
}

template <class Token>
void test_call(const AttentionCall& call, float scale, uint64_t seed, bool again = false) {
  const AttentionShape& shape = call.shape;
  std::snprintf(what, sizeof what,
                "N %d heads %d dim %d B %d packed %d masks %d bias %d separate %d size %g scale %g"
                " bf16 %d seed %d",
                shape.n_max, shape.heads, shape.dim, static_cast<int>(shape.count), shape.packed,
                shape.masks, shape.bias, shape.separate, shape.size, scale,
                std::is_same_v<Token, BFloat16>, static_cast<int>(seed));
  const Tokens<Token> tokens(call, scale);
  const Attention& a = tokens.a;
  const int64_t width = tokens.width(call);
  Poisoned<Token> grad_out(a.total * width);
  Tokens<Token>::fill(call.grad_out, 1, grad_out.data, 1);
  Outputs<Token> made(a, width);
  made.run(a, grad_out.data);
  check(call, a, attention_truth(call, scale), made);
  if (!again) return;
  Outputs<Token> other(a, width);
  other.run(a, grad_out.data);
  CHECK(made.same_bits(other));
  CHECK(!forward_traps<Token>(a, other.out.data, nullptr));  // lse is not wanted
  CHECK(made.same_bits(other));
}

template <class Token>
void test(const AttentionShape& shape, float scale, uint64_t seed, bool again = false) {
  test_call<Token>(draw_attention(shape, seed), scale, seed, again);
}

// All scores alike and far from 0: e to the power of lse is 0 or infinite.
template <class Token>
void test_constant(float q, float k) {
  AttentionCall call = draw_attention({21, 1, 32, 1, false, false, false, true, 100}, 9);
  std::fill(call.q.begin(), call.q.end(), q);
  std::fill(call.k.begin(), call.k.end(), k);
  test_call<Token>(call, 0.18f, 9);
}

// Random small calls; the large ones are named in main().
void test_random(uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto draw = [&](int most) { return static_cast<int32_t>(random() % (most + 1)); };
  const int32_t dims[] = {32, 64, 128};
  const AttentionShape shape{draw(50),       1 + draw(1),    dims[draw(2)],  1 + draw(1),
                             draw(2) != 0,   draw(2) != 0,   draw(1) != 0,   draw(1) != 0,
                             draw(3) ? 1.0f : 20.0f};
  const float scale = (draw(3) ? 1 : -1) / std::sqrt(static_cast<float>(shape.dim));
  // Rounding a biased query moves large scores: what that does to a softmax has no bound here.
  AttentionShape exact = shape;
  exact.bias &= shape.size == 1;
  if (draw(1)) {
    test<BFloat16>(exact, scale, seed);
  } else {
    test<Float16>(exact, scale, seed);
  }
}

// The same piece of eight neighbouring rows lies in all banks, and no two pieces in one place.
template <int kDim>
void test_places() {
  std::snprintf(what, sizeof what, "places, dim %d", kDim);
  std::set<uint32_t> all;
  for (uint32_t row = 0; row < 64; ++row) {
    for (uint32_t piece = 0; piece < kDim / 8; ++piece) {
      const uint32_t at = place<kDim>(row, piece);
      CHECK(at % 16 == 0 && all.insert(at).second && all.insert(at + kTile<kDim>).second);
      CHECK(piece % 2 || place<kDim>(row, piece % 2) == (at ^ (piece * 16)));
    }
  }
  CHECK(*all.rbegin() + 16 == 64 * kDim * 2 * 2);
  for (uint32_t row = 0; row < 64; row += 8) {
    for (uint32_t piece = 0; piece < kDim / 8; ++piece) {
      std::set<uint32_t> banks;
      for (uint32_t i = 0; i < 8; ++i) banks.insert(place<kDim>(row + i, piece) % 128);
      CHECK(banks.size() == 8);
    }
  }
}

// cu_seqlens that lead out of the batch end the launch before anything is read by them.
void test_traps() {
  std::snprintf(what, sizeof what, "traps");
  const AttentionCall call = draw_attention({20, 1, 32, 2, true, true, true, true, 1}, 3);
  const int32_t total = static_cast<int32_t>(Tokens<Float16>::rows(call));
  const std::vector<int32_t> bad[] = {{1, 2, 3},  {-1, 2, 3}, {0, 21, 22},       {0, 2, 1},
                                      {0, -1, 3}, {0, 3, -9}, {0, 5, total + 1}, {0, 0, INT32_MAX}};
  for (const auto& cu_seqlens : bad) {
    Tokens<Float16> tokens(call, 1);
    Outputs<Float16> made(tokens.a, 32);
    Poisoned<Float16> grad_out(made.size);
    tokens.a.cu_seqlens = cu_seqlens.data();
    CHECK(forward_traps(tokens.a, made.out.data, made.lse.data));
    CHECK(backward_traps<Float16>(tokens.a, made.gradient(tokens.a, grad_out.data)));
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    test_random(std::strtoull(argv[1], nullptr, 10));
    return 0;
  }
  test_places<32>(), test_places<64>(), test_places<128>();
  test_traps();
  test<Float16>({0, 2, 32, 2, false, true, false, false, 1}, 1, 1);
  test<BFloat16>({1, 1, 64, 2, true, true, true, true, 1}, 0.125f, 2);
  test<BFloat16>({17, 2, 64, 1, false, false, false, false, 1}, 0.125f, 3, true);
  test<Float16>({70, 1, 64, 2, true, true, true, false, 1}, -0.125f, 4);
  test<BFloat16>({33, 1, 128, 1, false, true, true, true, 1}, 0.09f, 5);
  test<Float16>({40, 1, 32, 2, true, true, false, true, 100}, 0.18f, 6);
  test<BFloat16>({20, 1, 32, 1, false, false, false, false, 100}, 0, 7);
  test<BFloat16>({256, 1, 32, 1, false, false, false, false, 1}, 0.18f, 8);
  test_constant<Float16>(30, -30), test_constant<BFloat16>(30, 30);
  for (uint64_t seed = 1; seed < 4; ++seed) test_random(seed);
  std::puts("emulated CUDA attention: the formulas of core/attention.h");
}
