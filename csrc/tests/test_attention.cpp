// The CPU's masked attention against its truth in double precision, on drawn calls. Run by ctest,
// once for each instruction set (SPCXR_CPU_ISA); 77 when this CPU lacks it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "attention_calls.h"
#include "core/patch_gather.h"

using namespace spcxr;

namespace {

const char* g_what = "";

#define CHECK(held)                                                                     \
  do {                                                                                  \
    if (!(held)) {                                                                      \
      std::fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #held, g_what);      \
      std::exit(1);                                                                     \
    }                                                                                   \
  } while (0)

int64_t bytes_of(TokenType type) { return type == TokenType::kFloat32 ? 4 : 2; }

// Finite values that the type holds exactly, and NaN; and back.
float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, digits = bits & 1023;
  const float size = exponent == 0 ? std::ldexp(float(digits), -24)
                                   : std::ldexp(float(1024 + digits), exponent - 25);
  return exponent == 31 ? std::numeric_limits<float>::quiet_NaN() : bits & 0x8000 ? -size : size;
}

uint16_t float_to_half(float value) {
  if (value != value) return 0x7E00;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (size < 0x1p-14f) return static_cast<uint16_t>(sign | int(std::nearbyint(size * 0x1p24f)));
  int exponent;
  const float digits = std::frexp(size, &exponent);  // in [0.5, 1)
  return static_cast<uint16_t>(sign + ((exponent + 13) << 10) + int(std::nearbyint(digits * 2048)));
}

void put(TokenType type, void* to, int64_t at, float value) {
  if (type == TokenType::kFloat32) {
    static_cast<float*>(to)[at] = value;
  } else {
    static_cast<uint16_t*>(to)[at] = type == TokenType::kFloat16
                                         ? float_to_half(value)
                                         : static_cast<uint16_t>(float_to_bits(value) >> 16);
  }
}

float get(TokenType type, const void* from, int64_t at) {
  if (type == TokenType::kFloat32) return static_cast<const float*>(from)[at];
  const uint16_t bits = static_cast<const uint16_t*>(from)[at];
  return type == TokenType::kFloat16 ? half_to_float(bits) : bits_to_float(uint32_t{bits} << 16);
}

// Bytes that read as NaN in every type until they are written.
using Bytes = std::vector<uint8_t>;

// Where q, k and v, or their gradients, lie: together as [total, 3, heads, dim], or each by itself
// with gaps that nobody may write.
struct Layout {
  Strides strides[3];
  int64_t start[3], size;
};

Layout layout_of(const AttentionCall& call, int64_t gap) {
  const auto& s = call.shape;
  const int64_t width = int64_t{s.heads} * s.dim;
  Layout layout{};
  for (int64_t which = 0; which < 3; ++which) {
    Strides& strides = layout.strides[which];
    layout.start[which] = s.separate ? layout.size : which * width;
    if (!s.separate) {
      strides = Strides{s.n_max * 3 * width, 3 * width, s.dim};
      layout.size = call.total * 3 * width;
      continue;
    }
    if (s.packed || which == 1) {  // by tokens, or by heads
      strides.head = s.dim + gap;
      strides.token = s.heads * strides.head + which;
      strides.batch = s.n_max * strides.token + gap;
    } else {
      strides.token = s.dim + gap + which;
      strides.head = s.n_max * strides.token + gap;
      strides.batch = s.heads * strides.head + which;
    }
    layout.size += s.packed ? call.total * strides.token : s.count * strides.batch;
  }
  return layout;
}

// A call in memory of one type, and what came out of it.
struct Run {
  const AttentionCall& call;
  TokenType type;
  Layout in, gradients;
  Bytes qkv, bias, grad_out, out, grads;
  std::vector<float> lse;
  Attention a{};
  AttentionGradient g{};

  Run(const AttentionCall& drawn, TokenType of_type, float scale)
      : call(drawn), type(of_type), in(layout_of(drawn, 3)), gradients(layout_of(drawn, 5)),
        qkv(bytes(in.size), 0xFF), bias(bytes(drawn.bias.size())),
        grad_out(bytes(drawn.grad_out.size())), out(grad_out.size(), 0xFF),
        grads(bytes(gradients.size), 0xFF),
        lse(size_t(drawn.shape.heads * drawn.total), std::nanf("")) {
    const auto& s = call.shape;
    const std::vector<float>* const values[] = {&call.q, &call.k, &call.v};
    for (int which = 0; which < 3; ++which) {
      each(in, which, [&](int64_t row, int64_t at) {
        put(type, qkv.data(), at, (*values[which])[size_t(row)]);
      });
    }
    for (size_t i = 0; i < call.bias.size(); ++i) put(type, bias.data(), int64_t(i), call.bias[i]);
    for (size_t i = 0; i < call.grad_out.size(); ++i) {
      put(type, grad_out.data(), int64_t(i), call.grad_out[i]);
    }
    const auto place = [&](const Layout& l, Bytes& b, int which) {
      return b.data() + l.start[which] * bytes_of(type);
    };
    a = Attention{type, place(in, qkv, 0), place(in, qkv, 1), place(in, qkv, 2), in.strides[0],
                  in.strides[1], in.strides[2], s.bias ? bias.data() : nullptr,
                  s.masks ? call.key_bits.data() : nullptr,
                  s.packed ? call.cu_seqlens.data() : nullptr, s.count, call.total, s.n_max,
                  s.heads, s.dim, scale};
    g = AttentionGradient{out.data(), grad_out.data(), lse.data(), place(gradients, grads, 0),
                          place(gradients, grads, 1), place(gradients, grads, 2),
                          gradients.strides[0], gradients.strides[1], gradients.strides[2]};
  }
  size_t bytes(int64_t elements) const { return size_t(elements * bytes_of(type)); }
  int64_t pairs() const { return call.shape.count * call.shape.heads; }

  void operator()() {
    masked_attention_cpu(a, 0, pairs(), out.data(), lse.data());
    masked_attention_backward_cpu(a, g, 0, pairs());
  }
  // Calls `work` with each element of [total, heads, dim] and where it lies.
  template <typename Work>
  void each(const Layout& l, int which, const Work& work) const {
    const auto& s = call.shape;
    int64_t element = 0;
    for (int64_t b = 0; b < s.count; ++b)
      for (int32_t i = 0; i < call.length(b); ++i)
        for (int32_t h = 0; h < s.heads; ++h)
          for (int32_t d = 0; d < s.dim; ++d, ++element) {
            const Strides& t = l.strides[which];
            const int64_t first = s.packed ? call.cu_seqlens[size_t(b)] * t.token : b * t.batch;
            work(element, l.start[which] + first + i * t.token + h * t.head + d);
          }
  }
};

double root_mean_square(const std::vector<double>& values) {
  double square = 0;
  for (const double value : values) square += value * value;
  return std::sqrt(square / double(std::max<size_t>(values.size(), 1)));
}

// The fewest keys that a sequence sees, if it sees any.
int32_t fewest_keys(const AttentionCall& call) {
  int32_t fewest = std::max(call.shape.n_max, 1);
  for (int64_t b = 0; b < call.shape.count; ++b) {
    int32_t keys = 0;
    for (int32_t j = 0; j < call.length(b); ++j) keys += !call.masked(b, j);
    if (keys > 0) fewest = std::min(fewest, keys);
  }
  return fewest;
}

// How far values may be off: all of them a share of their own size and of what they are differences
// of; together, a share of what each may be.
struct Judge {
  double relative, absolute, size;
  std::vector<double> errors{};

  Judge(const Run& run, const std::vector<double>& truth, bool gradient)
      : relative(run.type == TokenType::kFloat32   ? 0x1p-24
                 : run.type == TokenType::kFloat16 ? 0x1p-11
                                                   : 0x1p-8),
        size(root_mean_square(truth)) {
    const double inputs = run.call.shape.size;  // logits are about inputs * inputs
    const double few = inputs > 1 ? 1 : fewest_keys(run.call);  // so many share the probability
    const double terms = gradient ? size + inputs / few : size;
    // The backward pass reads out as it was stored.
    absolute = terms * (0x1p-24 * (256 + 8 * inputs * inputs) + (gradient ? 16 * relative : 0));
  }
  void operator()(double got, double truth) {
    errors.push_back(got - truth);
    CHECK(std::fabs(got - truth) <= 1.01 * relative * std::fabs(truth) + absolute);
  }
  double share() const {
    const double allowed = relative * size + absolute / 16;
    return allowed > 0 ? root_mean_square(errors) / allowed : 0;
  }
};

double check_values(const Run& run, const AttentionTruth& truth) {
  Judge outs(run, truth.out, false);
  for (size_t i = 0; i < truth.out.size(); ++i) {
    outs(get(run.type, run.out.data(), int64_t(i)), truth.out[i]);
  }
  double worst = outs.share();
  for (size_t i = 0; i < truth.lse.size(); ++i) {
    const double got = run.lse[i], right = truth.lse[i];
    CHECK(got == right || std::fabs(got - right) <= 1e-6 * (4 + std::fabs(right)));
  }
  const std::vector<double>* const gradients[] = {&truth.dq, &truth.dk, &truth.dv};
  std::vector<bool> ours(size_t(run.gradients.size));
  for (int which = 0; which < 3; ++which) {
    Judge judge(run, *gradients[which], true);
    run.each(run.gradients, which, [&](int64_t element, int64_t at) {
      ours[size_t(at)] = true;
      judge(get(run.type, run.grads.data(), at), (*gradients[which])[size_t(element)]);
    });
    worst = std::max(worst, judge.share());
  }
  for (int64_t at = 0; at < run.gradients.size; ++at) {  // the gaps
    for (int64_t i = 0; i < bytes_of(run.type) && !ours[size_t(at)]; ++i) {
      CHECK(run.grads[size_t(at * bytes_of(run.type) + i)] == 0xFF);
    }
  }
  CHECK(worst <= 1);
  return worst;
}

bool same(const Run& one, const Run& two) {
  return one.out == two.out && one.grads == two.grads &&
         (one.lse.empty() ||
          std::memcmp(one.lse.data(), two.lse.data(), one.lse.size() * sizeof(float)) == 0);
}

// Pair by pair, in another order and by two threads: the same bits.
void check_splits(const Run& whole) {
  Run parts(whole.call, whole.type, whole.a.scale);
  for (int64_t pair = parts.pairs() - 1; pair >= 0; --pair) {
    masked_attention_cpu(parts.a, pair, pair + 1, parts.out.data(), parts.lse.data());
  }
  for (int64_t pair = parts.pairs() - 1; pair >= 0; --pair) {
    masked_attention_backward_cpu(parts.a, parts.g, pair, pair + 1);
  }
  CHECK(same(whole, parts));
  Run threads(whole.call, whole.type, whole.a.scale);
  const int64_t middle = threads.pairs() / 2;
  const auto half = [&](int64_t begin, int64_t end) {
    masked_attention_cpu(threads.a, begin, end, threads.out.data(), threads.lse.data());
    masked_attention_backward_cpu(threads.a, threads.g, begin, end);
  };
  std::thread other(half, 0, middle);
  half(middle, threads.pairs());
  other.join();
  CHECK(same(whole, threads));
  masked_attention_cpu(parts.a, 0, parts.pairs(), parts.out.data(), nullptr);
  CHECK(same(whole, parts));
}

const AttentionShape kShapes[] = {
    // n_max, heads, dim, count, packed, masks, bias, separate, size
    {0, 2, 64, 2, false, false, false, false, 1},
    {5, 2, 16, 0, false, true, true, false, 1},
    {1, 1, 64, 1, false, false, false, false, 1},
    {1, 2, 8, 5, true, true, true, true, 1},
    {3, 3, 5, 6, false, true, true, true, 1},
    {7, 2, 1, 5, true, true, false, true, 2},
    {16, 2, 16, 4, false, true, true, false, 1},
    {17, 3, 33, 4, false, true, true, true, 1},
    {31, 1, 20, 5, true, true, true, false, 3},
    {50, 6, 64, 3, false, false, true, false, 1},
    {50, 2, 64, 6, false, true, false, true, 1},
    {64, 2, 128, 4, true, true, true, false, 1},
    {65, 1, 127, 3, false, true, true, true, 1},
    {99, 2, 32, 5, true, true, false, false, 10},
    {128, 2, 80, 2, false, false, true, true, 1},
    {197, 2, 64, 2, false, false, true, false, 1},
    {197, 2, 64, 4, false, true, true, false, 1},
    {200, 1, 72, 5, true, true, true, true, 1},
    {257, 1, 64, 2, false, true, false, false, 100},
    {300, 1, 256, 1, false, false, true, false, 1},
    {577, 1, 24, 2, true, true, true, false, 1},
    {1025, 1, 64, 1, false, false, false, false, 1},
};

}  // namespace

int main() {
  if (cpu_isa() == nullptr) return 77;
  const char* const asked = std::getenv("SPCXR_CPU_ISA");
  double worst = 0;
  uint64_t seed = 0;
  for (const AttentionShape& shape : kShapes) {
    const AttentionCall call = draw_attention(shape, ++seed);
    const int sign = seed % 6 == 4 ? -1 : seed % 6 == 5 ? 0 : 1;
    const float scale = static_cast<float>(sign) / std::sqrt(static_cast<float>(shape.dim));
    const AttentionTruth truth = attention_truth(call, scale);
    for (const TokenType type :
         {TokenType::kFloat32, TokenType::kBFloat16, TokenType::kFloat16}) {
      const std::string what = "N " + std::to_string(shape.n_max) + ", dim " +
                               std::to_string(shape.dim) + ", type " +
                               std::to_string(static_cast<int>(type));
      g_what = what.c_str();
      CHECK(asked == nullptr || type == TokenType::kBFloat16 ||
            std::strcmp(asked, attention_isa(type, shape.dim)) == 0);
      Run run(call, type, scale);
      run();
      worst = std::max(worst, check_values(run, truth));
      check_splits(run);
    }
  }
  std::printf("attention: ok, %s; errors at most %.2f of what is allowed\n",
              attention_isa(TokenType::kFloat32, 64), worst);
}
