// The CPU's kernels against the arithmetic of one pixel in views.h, on drawn calls. Run by ctest,
// once for each instruction set (SPCXR_CPU_ISA); 77 when this CPU lacks it. `test_patch_gather CALLS
// digest` prints a digest of all outputs: that of portable must be everyone's.
#include <string>
#include <thread>

#include "core/patch_checks.h"
#include "patch_calls.h"

namespace {

uint64_t g_digest = 0xCBF29CE484222325u;  // FNV-1a

void digest(const void* data, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    g_digest = (g_digest ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001B3u;
  }
}

struct Truth {
  float value;
  bool exact;
  double tolerance;
};

Truth truth(const Call& call, int64_t b, int32_t n, int32_t e) {
  const Views& v = call.v;
  const Fill& f = call.f;
  const Element at = element(v, n, e);
  const auto clean = [&](int64_t image, int32_t row, int32_t column) {
    return Truth{call.clean(image, at.channel, row, column), call.exact(image),
                 call.tolerance(image)};
  };
  if (!is_hidden(v, f, b, at.row, at.column)) return clean(b, at.row, at.column);
  if (f.kind[b] == kNoise) return Truth{noise_value(v, f, b, n, e), true, 0};
  if (f.kind[b] == kZeros) return Truth{0, true, 0};
  if (f.kind[b] == kOther) return clean(f.partner[b], at.row, at.column);
  const Place from = shuffled(f, b, at.row, at.column);
  return clean(b, from.row, from.column);
}

void expect(const Truth& t, const void* tokens, TokenType type, int64_t i) {
  const double got = token_at(tokens, type, i), size = std::fabs(t.value);
  if (t.exact) {
    CHECK(bits_at(tokens, type, i) == bits_of(t.value, type));
  } else {
    const double step = type == TokenType::kFloat32 ? 0 : type == TokenType::kBFloat16 ? 0x1p-8 : 0x1p-11;
    CHECK(std::fabs(got - t.value) <= t.tolerance + size * step);
  }
}

void check_masked(const Call& call) {
  const Views& v = call.v;
  const int64_t count = v.count * v.patches() * v.row_length();
  const Memory tokens(size_t(count) * bytes_of(call.type)), again(tokens.size);
  masked_patch_gather_cpu(v, call.f, 0, v.count, tokens.as<void>(), call.type);
  for (int64_t b = v.count - 1; b >= 0; --b) {  // image by image, another order: the same bits
    masked_patch_gather_cpu(v, call.f, b, b + 1, again.as<void>(), call.type);
  }
  CHECK(std::memcmp(tokens.as<void>(), again.as<void>(), tokens.size) == 0);
  digest(tokens.as<void>(), tokens.size);
  int64_t i = 0;
  for (int64_t b = 0; b < v.count; ++b)
    for (int32_t n = 0; n < v.patches(); ++n)
      for (int32_t e = 0; e < v.row_length(); ++e, ++i) {
        expect(truth(call, b, n, e), tokens.as<void>(), call.type, i);
      }
}

// Two threads share out the images, each in its own scratch.
void check_threads(const Call& call) {
  const Views& v = call.v;
  const size_t bytes = size_t(v.count * v.patches() * v.row_length()) * bytes_of(call.type);
  const Memory one(bytes), two(bytes);
  masked_patch_gather_cpu(v, call.f, 0, v.count, one.as<void>(), call.type);
  std::thread other(
      [&] { masked_patch_gather_cpu(v, call.f, 0, 1, two.as<void>(), call.type); });
  masked_patch_gather_cpu(v, call.f, 1, v.count, two.as<void>(), call.type);
  other.join();
  CHECK(std::memcmp(one.as<void>(), two.as<void>(), bytes) == 0);
}

void check_visible(const Call& call, Dice& dice) {
  const Views& v = call.v;
  const Memory mask(size_t(v.count * v.patches()));
  for (size_t i = 0; i < mask.size; ++i) mask.as<uint8_t>()[i] = uint8_t(dice.below(2) * 254);
  std::vector<int32_t> starts(size_t(v.count) + 1, -5);
  count_visible_cpu(mask.as<bool>(), v.count, v.patches(), starts.data());
  const Memory tokens(size_t(starts.back()) * v.row_length() * bytes_of(call.type));
  const Memory ids(size_t(starts.back()) * 4);
  visible_patch_gather_cpu(v, mask.as<bool>(), starts.data(), 0, v.count, tokens.as<void>(),
                           call.type, ids.as<int32_t>());
  int64_t row = 0;
  for (int64_t b = 0; b < v.count; ++b) {
    CHECK(starts[size_t(b)] == row);
    for (int32_t n = 0; n < v.patches(); ++n) {
      if (flag(mask.as<bool>(), b * v.patches() + n)) continue;
      CHECK(ids.as<int32_t>()[row] == n);
      for (int32_t e = 0; e < v.row_length(); ++e) {
        const Element at = element(v, n, e);
        const Truth t{call.clean(b, at.channel, at.row, at.column), call.exact(b), call.tolerance(b)};
        expect(t, tokens.as<void>(), call.type, row * v.row_length() + e);
      }
      ++row;
    }
  }
  CHECK(starts.back() == row);
}

// One patch's wanted values in double; how far float may be from them.
double wanted_values(const Call& call, int64_t b, int32_t n, bool normalise,
                     std::vector<double>& out) {
  const int32_t length = call.v.row_length();
  out.resize(size_t(length));
  double mean = 0, square = 0, tolerance = call.exact(b) ? 1e-6 : call.tolerance(b);
  for (int32_t e = 0; e < length; ++e) {
    const Element at = element(call.v, n, e);
    mean += out[size_t(e)] = call.clean(b, at.channel, at.row, at.column);
  }
  if (!normalise) return tolerance;
  mean /= length;
  for (const double t : out) square += (t - mean) * (t - mean);
  const double deviation = std::sqrt(square / (length - 1) + kPatchVarianceFloor);
  for (double& t : out) t = (t - mean) / deviation;
  return 4 * tolerance / deviation + 1e-6;
}

void check_loss(const Call& call, Dice& dice) {
  const Views& v = call.v;
  const int64_t image = int64_t{v.patches()} * v.row_length(), count = v.count * image;
  const Memory predicted(size_t(count) * bytes_of(call.type)), gradient(predicted.size);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(dice.unit() * 6 - 3, call.type);
    std::memcpy(predicted.as<uint8_t>() + i * int64_t(bytes_of(call.type)), &bits, bytes_of(call.type));
  }
  const LossLaw law{static_cast<Distance>(dice.below(2)), dice.below(2) == 1};
  const bool signs = law.distance == Distance::kL1;
  const float weight = 0.125f, slope_weighs = weight * float(slope_weight(law.distance));
  const Memory slope(size_t(count) * (signs ? 1 : sizeof(float)));
  std::vector<double> sums(size_t(v.count), -1), again(size_t(v.count), -1), wanted;
  std::vector<int64_t> counts(size_t(v.count), -1), counted(size_t(v.count), -1);
  masked_reconstruction_loss_cpu(v, call.f.mask, call.f.unit, predicted.as<void>(), call.type, law, 0,
                                 v.count, sums.data(), counts.data(), slope.as<void>());
  for (int64_t b = v.count - 1; b >= 0; --b) {
    masked_reconstruction_loss_cpu(v, call.f.mask, call.f.unit, predicted.as<void>(), call.type, law,
                                   b, b + 1, again.data(), counted.data(), nullptr);
  }
  const float factors[] = {bits_to_float(0x7FFFFFFFu), slope_weighs};  // any NaN stays one
  for (const float factor : factors) {
    for (int64_t begin = 0, end; begin < count; begin = end) {
      end = std::min(count, begin + 1 + dice.below(uint32_t(count)));
      reconstruction_gradient_cpu(slope.as<void>(), signs, factor, count, begin, end,
                                  gradient.as<void>(), call.type);
    }
    const double first = count == 0 ? 0 : token_at(gradient.as<void>(), call.type, count - 1);
    CHECK(count == 0 || (first != first) == (factor != factor));
  }
  CHECK(std::memcmp(sums.data(), again.data(), sums.size() * sizeof(double)) == 0);
  CHECK(counts == counted);
  digest(sums.data(), sums.size() * sizeof(double));
  digest(slope.as<void>(), slope.size);
  digest(gradient.as<void>(), gradient.size);
  int64_t i = 0;
  for (int64_t b = 0; b < v.count; ++b) {
    double sum = 0, slack = 1e-9;
    int64_t hidden = 0;
    for (int32_t n = 0; n < v.patches(); ++n) {
      const double tolerance = wanted_values(call, b, n, law.normalise_patches, wanted);
      for (int32_t e = 0; e < v.row_length(); ++e, ++i) {
        const Element at = element(v, n, e);
        const double slope = token_at(gradient.as<void>(), call.type, i);
        if (!is_hidden(v, call.f, b, at.row, at.column)) {
          CHECK(bits_at(gradient.as<void>(), call.type, i) == 0);
          continue;
        }
        const double error = token_at(predicted.as<void>(), call.type, i) - wanted[size_t(e)];
        const bool squared = law.distance == Distance::kMSE;
        sum += squared ? error * error : std::fabs(error);
        slack += (squared ? 2 * std::fabs(error) + tolerance : 1) * (tolerance + 1e-6);
        const double right = weight * (squared ? 2 * error : (error > 0) - (error < 0));
        if (squared || std::fabs(error) > tolerance) {
          CHECK(std::fabs(slope - right) <= std::fabs(right) * 0x1p-8 + 2 * tolerance);
        }
        ++hidden;
      }
    }
    CHECK(std::fabs(sums[size_t(b)] - sum) <= slack);
    CHECK(counts[size_t(b)] == hidden);
  }
}

// One image, whole, to `out` x `out` in patches of 16.
Views one_image(const void* pixels, PixelType type, int32_t high, int32_t wide, int32_t out,
                const float* scale, const float* shift) {
  Views v{};
  v.pixels = pixels;
  v.pixel_type = type;
  v.channels = 1;
  v.count = 1;
  v.source_h = high;
  v.source_w = wide;
  v.row_stride = wide;
  v.out_h = v.out_w = out;
  v.patch = 16;
  v.scale = scale;
  v.shift = shift;
  return v;
}

// Any float there is, as it is, in every token type: subnormal, infinite, NaN.
void check_roundings(Dice& dice) {
  std::vector<float> pixels;
  for (uint32_t bits = 0; bits < 0x10000u; bits += 0x80u) {  // every exponent, rests near a tie
    for (const uint32_t rest : {0u, 1u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu, 0x1000u, 0x1001u}) {
      pixels.push_back(bits_to_float(bits << 16 | rest));
    }
  }
  while (pixels.size() < 96 * 96) pixels.push_back(bits_to_float(dice.word()));
  const float scale = 1, shift = -0.0f;
  const Views v = one_image(pixels.data(), PixelType::kFloat32, 96, 96, 96, &scale, &shift);
  for (const TokenType type : {TokenType::kFloat32, TokenType::kBFloat16, TokenType::kFloat16}) {
    const Memory tokens(size_t{96 * 96} * bytes_of(type));
    masked_patch_gather_cpu(v, Fill{}, 0, 1, tokens.as<void>(), type);
    digest(tokens.as<void>(), tokens.size);
    for (int32_t i = 0; i < 96 * 96; ++i) {
      const Element at = element(v, i / 256, i % 256);
      float value = pixels[size_t(at.row) * 96 + size_t(at.column)];
      if (value != value) value = bits_to_float(float_to_bits(value) | 0x400000u);  // made quiet
      CHECK(bits_at(tokens.as<void>(), type, i) == bits_of(value, type));
    }
  }
}

// Boxes whose sixteen columns see about as many as two registers hold.
void check_windows() {
  for (int32_t wide = 28; wide <= 36; ++wide) {
    std::vector<uint8_t> pixels(size_t(wide) * 32);
    for (size_t i = 0; i < pixels.size(); ++i) pixels[i] = uint8_t(i * 97 >> 2);
    const float scale = 1, shift = 0;
    const Views v = one_image(pixels.data(), PixelType::kUInt8, 32, wide, 16, &scale, &shift);
    const Memory tokens(256 * sizeof(float));
    masked_patch_gather_cpu(v, Fill{}, 0, 1, tokens.as<void>(), TokenType::kFloat32);
    digest(tokens.as<void>(), tokens.size);
  }
}

// This program once more, as portable.
uint64_t portable_digest(const char* program, int calls) {
  const std::string command =
      "SPCXR_CPU_ISA=portable '" + std::string(program) + "' " + std::to_string(calls) + " digest";
  FILE* const pipe = popen(command.c_str(), "r");
  CHECK(pipe != nullptr);
  unsigned long long value = 0;
  CHECK(std::fscanf(pipe, "%llx", &value) == 1);
  CHECK(pclose(pipe) == 0);
  return value;
}

}  // namespace

int main(int argc, char** argv) {
  if (cpu_isa() == nullptr) return 77;
  const char* const asked = std::getenv("SPCXR_CPU_ISA");
  CHECK(asked == nullptr || std::strcmp(asked, cpu_isa()) == 0);
  const int calls = argc > 1 ? std::atoi(argv[1]) : 250;
  for (g_call = 0; g_call < calls; ++g_call) {
    Dice dice(g_call);
    Call call(dice);
    CHECK(refuse_sizes(call.v) == nullptr && refuse_boxes(call.v) == nullptr);
    CHECK(refuse_fill(call.v, call.f) == nullptr);
    if (dice.below(9) == 0) call.f.mask = nullptr;
    check_masked(call);
    if (g_call % 10 == 0) check_threads(call);
    check_visible(call, dice);
    check_loss(call, dice);
  }
  g_call = -1;
  Dice dice(calls);
  check_roundings(dice);
  check_windows();
  if (argc > 2) {
    std::printf("%llx\n", static_cast<unsigned long long>(g_digest));
    return 0;
  }
  if (std::strcmp(cpu_isa(), "portable") != 0) CHECK(portable_digest(argv[0], calls) == g_digest);
  std::printf("patch_gather: ok, %s\n", cpu_isa());
}
