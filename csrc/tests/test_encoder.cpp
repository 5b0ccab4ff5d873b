// The encoder's linear layers against plain sums in double. Compiled once for each SPCXR_TILE_ISA:
// `emulated` runs the kernels' code on the instructions of tile_emulation.h, without an argument on
// those of this CPU; 77 when it lacks them.
#define SPCXR_ISA emulated
#include "tile_emulation.h"

#include SPCXR_TILE_OPS

#include "cpu/encoder_body.h"

#include <cmath>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "tile_isa.h"

#define CHECK(held)                                                                  \
  do {                                                                               \
    if (!(held)) {                                                                   \
      std::fprintf(stderr, "%s:%d: %s (case %d)\n", __FILE__, __LINE__, #held, g_case); \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (0)

using namespace spcxr;

namespace {

int g_case = 0;

uint16_t bits16(double value) {
  const uint32_t bits = float_to_bits(static_cast<float>(value));
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}
double value_of(uint16_t bits) { return bits_to_float(uint32_t{bits} << 16); }

// Exactly so many elements, an odd number of them past a multiple of 64 bytes, at first NaN: a
// sanitizer sees what is read before or after.
struct Memory {
  explicit Memory(int64_t n) : count(n), bytes(new uint16_t[size_t(n) + 1]) {
    std::memset(bytes.get(), 0xFF, (size_t(n) + 1) * 2);
  }
  uint16_t* data() const { return bytes.get() + 1; }
  bool operator==(const Memory& other) const {
    return std::memcmp(data(), other.data(), size_t(count) * 2) == 0;
  }
  int64_t count;
  std::unique_ptr<uint16_t[]> bytes;
};

class Draw {
 public:
  explicit Draw(uint32_t seed) : state_(seed) {}
  Memory operator()(int64_t n, double size, double middle = 0) {
    Memory made(n);
    for (int64_t i = 0; i < n; ++i) {
      state_ = state_ * 1664525u + 1013904223u;
      made.data()[i] = bits16(middle + size * (double(state_ >> 8) / (1 << 23) - 1));
    }
    return made;
  }

 private:
  uint32_t state_;
};

// A layer of `in` to `out`: W [out, in] plain and in the kernels' order.
struct Layer {
  int32_t in, out;
  Memory plain, tiles, bias;

  Layer(Draw& draw, int32_t from, int32_t to)
      : in(from),
        out(to),
        plain(draw(int64_t{from} * to, 1.7 / std::sqrt(from))),
        tiles(int64_t{from} * to),
        bias(draw(to, 1)) {
    for (int32_t n = 0; n < out; ++n) {
      for (int32_t k = 0; k < in; ++k) {
        const int64_t tile = int64_t{n / 16} * (in / 32) + k / 32;
        tiles.data()[tile * 512 + k % 32 / 2 * 32 + n % 16 * 2 + k % 2] =
            plain.data()[int64_t{n} * in + k];
      }
    }
  }
  Linear linear() const { return {tiles.data(), bias.data(), in, out}; }
  std::vector<double> operator()(const std::vector<double>& row) const {
    std::vector<double> made(size_t(out), 0);
    for (int32_t n = 0; n < out; ++n) {
      for (int32_t k = 0; k < in; ++k) {
        const double weight = value_of(plain.data()[int64_t{n} * in + k]);
        made[size_t(n)] += value_of(bits16(row[size_t(k)])) * weight;
      }
      made[size_t(n)] += value_of(bias.data()[n]);
    }
    return made;
  }
};

std::vector<double> normalised(const std::vector<double>& row, const Norm& norm) {
  double mean = 0, variance = 0;
  for (const double x : row) mean += x / double(row.size());
  for (const double x : row) variance += (x - mean) * (x - mean) / double(row.size());
  std::vector<double> made;
  for (size_t i = 0; i < row.size(); ++i) {
    made.push_back((row[i] - mean) / std::sqrt(variance + double{norm.eps}) *
                       value_of(norm.weight[i]) + value_of(norm.bias[i]));
  }
  return made;
}

std::vector<double> row_of(const Memory& rows, int64_t row, int32_t wide) {
  std::vector<double> made;
  for (int32_t i = 0; i < wide; ++i) made.push_back(value_of(rows.data()[row * wide + i]));
  return made;
}

// What it is over all rows, of the truth: what rounding at each step allows.
void check_close(const Memory& made, const std::vector<double>& truth, double most) {
  CHECK(size_t(made.count) == truth.size());
  double wrong = 0, all = 1e-12;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double off = value_of(made.data()[i]) - truth[i];
    wrong += off * off;
    all += truth[i] * truth[i];
  }
  CHECK(std::sqrt(wrong / all) <= most);
}

// Scratch holds what was left in it: NaN at worst.
void poison_scratch() {
  constexpr size_t kBytes = size_t{8} << 20;
  std::memset(thread_scratch(kBytes), 0xFF, kBytes);
}

// The call in one piece, row by row, and on two threads: the same bits.
template <typename Call>
Memory in_every_way(int64_t rows, int64_t elements, const Call& call) {
  poison_scratch();
  Memory whole(elements), pieces(elements), threads(elements);
  call(0, rows, whole.data());
  for (int64_t row = rows - 1; row >= 0; --row) call(row, row + 1, pieces.data());
  CHECK(pieces == whole);
  std::thread other([&] { call(0, rows / 2, threads.data()); });
  call(rows / 2, rows, threads.data());
  other.join();
  CHECK(threads == whole);
  return whole;
}

void check(const EncoderKernels& kernels, int64_t rows, int32_t wide, int32_t hidden) {
  Draw draw(uint32_t(7 + g_case));
  const Layer qkv(draw, wide, hidden), proj(draw, wide, wide), fc1(draw, wide, hidden),
      fc2(draw, hidden, wide);
  const Memory weight = draw(wide, 0.5, 1), bias = draw(wide, 0.5);
  const Memory tokens = draw(rows * wide, 2, 0.3), attended = draw(rows * wide, 1);
  const Norm norm{weight.data(), bias.data(), 1e-6f};
  const BlockEnd end{proj.linear(), norm, fc1.linear(), fc2.linear()};
  const Memory first = in_every_way(rows, rows * hidden, [&](int64_t a, int64_t b, uint16_t* out) {
    kernels.norm_linear(norm, qkv.linear(), tokens.data(), a, b, out);
  });
  const Memory last = in_every_way(rows, rows * wide, [&](int64_t a, int64_t b, uint16_t* out) {
    kernels.residual_mlp(end, tokens.data(), attended.data(), a, b, out);
  });
  std::vector<double> of_first, of_last;
  for (int64_t r = 0; r < rows; ++r) {
    for (const double x : qkv(normalised(row_of(tokens, r, wide), norm))) of_first.push_back(x);
    std::vector<double> stream = row_of(tokens, r, wide);
    const auto branch = proj(row_of(attended, r, wide));
    for (size_t i = 0; i < stream.size(); ++i) stream[i] += branch[i];
    auto inner = fc1(normalised(stream, norm));
    for (double& x : inner) x *= 0.5 * std::erfc(-x / std::sqrt(2.0));
    const auto more = fc2(inner);
    for (size_t i = 0; i < stream.size(); ++i) of_last.push_back(stream[i] + more[i]);
  }
  check_close(first, of_first, 3e-3);
  check_close(last, of_last, 3e-3);
}

void check_gelu() {
  for (double x = -12; x <= 12; x += 1.0 / 512) {
    const double made = double{spcxr::emulated::gelu(spcxr::emulated::all(float(x)))[0]};
    CHECK(std::fabs(made - x * 0.5 * std::erfc(-x / std::sqrt(2.0))) <= 5e-5);
  }
  const float inf = __builtin_inff(), nan = __builtin_nanf("");
  CHECK(spcxr::emulated::gelu(spcxr::emulated::all(inf))[3] == inf);
  CHECK(std::isnan(spcxr::emulated::gelu(spcxr::emulated::all(nan))[3]));
  CHECK(spcxr::emulated::gelu(spcxr::emulated::all(-1e30f))[3] == 0.0f);
}

}  // namespace

int main(int argc, char** argv) {
  const bool emulated = asks_for_emulation(argc, argv);
  if (!emulated && lacks_tiles()) return kSkipped;
  const EncoderKernels& kernels =
      emulated ? spcxr::emulated::encoder_kernels : spcxr::SPCXR_TILE_ISA::encoder_kernels;
  check_gelu();
  // Rows about the eight, sixteen and 32 of a product, and about a strip.
  const int64_t counts[] = {0, 1, 7, 8, 9, 16, 17, 31, 32, 33, 50};
  for (const int64_t rows : counts) {
    check(kernels, rows, 32, 96);
    ++g_case;
  }
  check(kernels, spcxr::emulated::kStrip + 1, 64, 32);
  ++g_case;
  check(kernels, 5, 192, 768);
  std::printf("encoder: ok, %s%s\n", kName, emulated ? ", emulated" : "");
}
