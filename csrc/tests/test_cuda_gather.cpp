// The CUDA kernels of the fused input path, thread by thread on the CPU, against the arithmetic of
// core/views.h, on random calls. Run by ctest. An argument is the seed.
#include "cuda_emulation.h"

#include <algorithm>
#include <cstdio>

#include "cuda/patch_gather.cuh"
#include "cuda/reconstruction_loss.cuh"
#include "cuda/visible_patch_gather.cuh"
#include "gather_calls.h"

#define CHECK(held)                                                               \
  do {                                                                            \
    if (!(held)) {                                                                \
      std::fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #held, what);  \
      std::exit(1);                                                               \
    }                                                                             \
  } while (0)

using namespace spcxr;

namespace {

constexpr unsigned kThreads = 64;
char what[200] = "";  // the call that a failure names

float unpacked(float x) { return x; }
float unpacked(BFloat16 x) { return unpack(x); }
float unpacked(Float16 x) { return unpack(x); }
float rounded(float x, float) { return x; }
float rounded(float x, BFloat16) { return unpack(BFloat16{to_bfloat16(x)}); }
float rounded(float x, Float16) { return unpack(Float16{to_float16(x)}); }
template <class Token>
constexpr float step_of = sizeof(Token) == 4 ? 0 : 1 / 128.0f;  // of neighbouring tokens, relative

// Resampled values agree to rounding; a value that is copied or drawn, to the bit.
template <class Token>
bool agree(Token made, float truth, bool exact) {
  const float value = unpacked(made), goal = rounded(truth, Token{});
  if (exact) return std::memcmp(&value, &goal, 4) == 0;
  if (std::isnan(truth)) return std::isnan(value);
  return std::fabs(value - goal) <= 2e-5f + step_of<Token> * std::fabs(goal);
}

template <class Pixel>
struct Element {
  int32_t patch, e, channel, row, column;

  Element(const Views& v, int64_t index) {
    const int32_t length = v.row_length(), area = v.patch * v.patch;
    patch = static_cast<int32_t>(index / length), e = static_cast<int32_t>(index % length);
    channel = e / area;
    row = patch / v.grid_w() * v.patch + e % area / v.patch;
    column = patch % v.grid_w() * v.patch + e % v.patch;
  }
};

// Whether it trapped.
template <class Pixel, class Token>
bool run_gather(const Call<Pixel>& call, bool wide, Token* tokens) {
  const Layout layout = wide ? make_layout(call.v, 8, kDeep) : make_layout(call.v, 1, 1);
  const uint32_t a_block = kThreads * (wide ? 1 : 4);
  const auto an_image = static_cast<int32_t>((layout.pieces + a_block - 1) / a_block);
  const Divisor blocks = make_divisor(an_image);
  return emulated::traps(static_cast<unsigned>(call.v.count * an_image), kThreads, [&] {
    if (wide && whole_images(call.v)) {
      gather_wide_kernel<Pixel, Token, true>(call.v, call.f, layout, blocks, tokens);
    } else if (wide) {
      gather_wide_kernel<Pixel, Token, false>(call.v, call.f, layout, blocks, tokens);
    } else {
      gather_narrow_kernel<Token>(call.v, call.f, layout, blocks, tokens);
    }
  });
}

template <class Pixel, class Token>
void test_gather(const Call<Pixel>& call, bool wide, bool compare) {
  const Views& v = call.v;
  const int64_t elements = int64_t{v.patches()} * v.row_length();
  Buffer<Token> tokens(v.count * elements);
  CHECK(refuse(v, call.f.unit) == nullptr);
  CHECK(!run_gather(call, wide, tokens.data));
  for (int64_t i = 0; compare && i < v.count * elements; ++i) {
    const int64_t b = i / elements;
    const Element<Pixel> at(v, i % elements);
    float truth = 0;
    bool exact = true;
    if (!is_hidden(v, call.f, b, at.row, at.column)) {
      truth = call.view(b, at.channel, at.row, at.column), exact = call.exact(b);
    } else if (call.f.kind[b] == kNoise) {
      truth = noise_value(v, call.f, b, at.patch, at.e);
    } else if (call.f.kind[b] == kOther) {
      const int64_t other = call.f.partner[b];
      truth = call.view(other, at.channel, at.row, at.column), exact = call.exact(other);
    } else if (call.f.kind[b] == kShuffle) {
      const Place place = shuffled(call.f, b, at.row, at.column);
      truth = call.view(b, at.channel, place.row, place.column), exact = call.exact(b);
    }
    CHECK(agree(tokens[i], truth, exact));
  }
}

template <class Pixel, class Token>
void test_visible(Call<Pixel>& call, bool wide, bool compare) {
  const Views& v = call.v;
  const int32_t length = v.row_length(), n = v.patches();
  Buffer<bool> mask(v.count * n);
  std::vector<std::pair<int64_t, int32_t>> seen;
  std::vector<int32_t> sums{0};
  for (int64_t i = 0; i < v.count * n; ++i) {
    reinterpret_cast<uint8_t*>(mask.data)[i] = whole(0, 2) == 0 ? 254 : 0;
    if (!flag(mask.data, i)) seen.push_back({i / n, static_cast<int32_t>(i % n)});
    if (i % n == n - 1) sums.push_back(static_cast<int32_t>(seen.size()));
  }
  const auto total = static_cast<int64_t>(seen.size());
  const int64_t rows = std::max<int64_t>(total + whole(-3, 5), 0);
  Buffer<int32_t> cu_seqlens(v.count + 1), ids(rows);
  Buffer<Token> tokens(rows * length);
  const auto images = static_cast<unsigned>(v.count);
  emulated::launch(images, kThreads, [&] { count_visible_kernel(mask.data, n, cu_seqlens.data); });
  emulated::launch(1, kThreads, [&] { scan_kernel(v.count, cu_seqlens.data); });
  emulated::launch(images, kThreads,
                   [&] { list_visible_kernel(mask.data, n, cu_seqlens.data, rows, ids.data); });
  const int32_t rows_a_block = whole(1, 5);
  const Packed<Token> out{cu_seqlens.data, rows, tokens.data, ids.data};
  const Layout layout = wide ? make_layout(v, 8, kDeep) : make_layout(v, 1, 1);
  emulated::launch(static_cast<unsigned>((rows + rows_a_block - 1) / rows_a_block), kThreads, [&] {
    if (wide && whole_images(v)) {
      visible_wide_kernel<Pixel, Token, true>(v, layout, rows_a_block, out);
    } else if (wide) {
      visible_wide_kernel<Pixel, Token, false>(v, layout, rows_a_block, out);
    } else {
      visible_narrow_kernel<Token>(v, layout, rows_a_block, out);
    }
  });
  for (int64_t b = 0; b <= v.count; ++b) CHECK(cu_seqlens[b] == sums[b]);
  for (int64_t r = 0; r < rows; ++r) {
    CHECK(ids[r] == (r < total ? seen[r].second : -1));
    for (int32_t e = 0; compare && e < length; ++e) {
      const bool here = r < total;
      const Element<Pixel> at(v, here ? int64_t{ids[r]} * length + e : 0);
      const float truth = here ? call.view(seen[r].first, at.channel, at.row, at.column) : 0;
      CHECK(agree(tokens[r * length + e], truth, !here || call.exact(seen[r].first)));
    }
  }
}

// A patch's target as core/views.h and patch_gather.h define it.
template <class Pixel>
std::vector<float> target_of(const Call<Pixel>& call, const LossLaw& law, int64_t b,
                             int32_t patch) {
  const int32_t length = call.v.row_length();
  std::vector<float> target(length);
  double sum = 0, squares = 0;
  for (int32_t e = 0; e < length; ++e) {
    const Element<Pixel> at(call.v, int64_t{patch} * length + e);
    target[e] = call.view(b, at.channel, at.row, at.column);
    sum += target[e];
  }
  const double mean = sum / length;
  for (const float t : target) squares += (t - mean) * (t - mean);
  const double deviation = std::sqrt(squares / (length - 1) + kPatchVarianceFloor);
  for (float& t : target) {
    if (law.normalise_patches) t = static_cast<float>((t - mean) / deviation);
  }
  return target;
}

template <class Pixel, class Token>
void test_loss(const Call<Pixel>& call, bool wide) {
  const Views& v = call.v;
  const int32_t length = v.row_length(), n = v.patches(), unit = call.f.unit;
  const LossLaw law{whole(0, 1) ? Distance::kL1 : Distance::kMSE, whole(0, 1) == 1};
  const bool signs = law.distance == Distance::kL1;
  Buffer<Token> predicted(v.count * n * length), gradient(v.count * n * length);
  Buffer<float> errors(signs ? 0 : gradient.count);
  Buffer<int8_t> sign(signs ? gradient.count : 0);
  for (size_t i = 0; i < predicted.count; ++i) store_one(&predicted[i], real(-3, 3));
  Buffer<double> scratch(2 * v.count);
  float loss = NAN, slope_weighs = NAN;
  const bool backward = whole(0, 3) != 0;
  int32_t lanes = 1;
  while (lanes < length / (wide ? 8 : 1) && lanes < 32) lanes *= 2;
  Fill hidden{};
  hidden.mask = call.f.mask, hidden.unit = unit;
  const LossCall<Token> what_to{hidden,         law,
                                lanes,          predicted.data,
                                !backward ? nullptr
                                : signs   ? static_cast<void*>(sign.data)
                                          : static_cast<void*>(errors.data),
                                scratch.data,   scratch.data + v.count};
  const auto images = static_cast<unsigned>(v.count);
  const int64_t cells = int64_t{v.out_h / unit} * (v.out_w / unit);
  const Layout layout = make_layout(v, wide ? 8 : 1, 1);
  emulated::launch(images, kThreads, [&] {
    count_hidden_kernel(hidden.mask, cells, double{1} * unit * unit * v.channels, what_to.counts);
  });
  emulated::launch(images, kThreads, [&] {
    if (wide && whole_images(v)) {
      loss_kernel<Eight<Pixel, true>, Token>(v, layout, what_to);
    } else if (wide) {
      loss_kernel<Eight<Pixel, false>, Token>(v, layout, what_to);
    } else {
      loss_kernel<One, Token>(v, layout, what_to);
    }
  });
  emulated::launch(1, kThreads, [&] {
    mean_loss_kernel(what_to.sums, what_to.counts, v.count, slope_weight(law.distance), &loss,
                     &slope_weighs);
  });
  if (backward) {
    const auto elements = static_cast<int64_t>(gradient.count);
    emulated::launch(static_cast<unsigned>(elements / (8 * kThreads) + 1), kThreads, [&] {
      if (signs) {
        gradient_kernel(sign.data, &slope_weighs, elements, wide, gradient.data);
      } else {
        gradient_kernel(errors.data, &slope_weighs, elements, wide, gradient.data);
      }
    });
  }

  int64_t counted = 0;
  double truth = 0;
  const int64_t all = v.count * n * length;
  for (int64_t i = 0; i < all; ++i) {
    const Element<Pixel> at(v, i % (n * length));
    counted += is_hidden(v, call.f, i / (n * length), at.row, at.column);
  }
  const float weight = counted == 0 ? 0 : 1 / static_cast<float>(counted);
  std::vector<float> target;
  for (int64_t i = 0; i < all; ++i) {
    const Element<Pixel> at(v, i % (n * length));
    if (at.e == 0) target = target_of(call, law, i / (n * length), at.patch);
    const bool counts = is_hidden(v, call.f, i / (n * length), at.row, at.column);
    const float error = unpacked(predicted[i]) - target[at.e];
    if (counts) truth += double{weight} * loss_value(law.distance, error);
    const float slope_of_one = loss_slope(law.distance, error) * weight * (signs ? 1 : 2);
    const float slope = counts ? slope_of_one : 0;
    const bool near_zero = law.distance == Distance::kL1 && std::fabs(error) < 1e-3f;
    if (backward && !near_zero) CHECK(agree(gradient[i], slope, !counts));
  }
  CHECK(std::fabs(loss - truth) <= 1e-4 * (1 + truth));
}

template <class Pixel, class Token>
void test_all() {
  const int32_t patches[] = {4, 8, 14, 16, 7};
  for (const Boxes law : {Boxes::kNone, Boxes::kFlips, Boxes::kSame, Boxes::kCrops, Boxes::kWild}) {
    const int32_t patch = patches[whole(0, 9) < 6 ? 1 + 2 * whole(0, 1) : whole(0, 4)];
    const int32_t unit = whole(0, 1) ? 1 : patch;
    const int64_t count = law == Boxes::kWild ? 3 : whole(0, 3);
    Call<Pixel> call(count, patch, unit, law);
    const bool wide = patch % 8 == 0 && whole(0, 5) != 0, compare = law != Boxes::kWild;
    std::snprintf(what, sizeof what,
                  "B %d C %d %dx%d to %dx%d P %d unit %d boxes %d, pixel %zu token %zu",
                  static_cast<int>(count), call.v.channels, call.v.source_h, call.v.source_w,
                  call.v.out_h, call.v.out_w, patch, unit, static_cast<int>(law), sizeof(Pixel),
                  sizeof(Token));
    test_gather<Pixel, Token>(call, wide, compare);
    test_visible<Pixel, Token>(call, wide, compare);
    if (compare) test_loss<Pixel, Token>(call, wide);
  }
}

void test_divisors() {
  std::snprintf(what, sizeof what, "divisors");
  for (int i = 0; i < 20000; ++i) {
    const int32_t by = i < 1000 ? i + 1 : static_cast<int32_t>(draws() >> whole(1, 30)) | 1;
    const Divisor divisor = make_divisor(by);
    const uint32_t d = by, most = 0x7FFFFFFF, whole_times = most / d * d;
    for (const uint32_t n : {0u, d - 1, d, whole_times - 1, whole_times, most,
                             static_cast<uint32_t>(draws() >> 1)}) {
      CHECK(n > most || divisor(n) == n / d);
    }
  }
}

// A parameter that names nothing there is ends the launch, before anything is read by it.
void test_traps() {
  std::snprintf(what, sizeof what, "traps");
  for (int trap = 0; trap < 7; ++trap) {
    for (const bool wide : {true, false}) {
      Call<uint8_t> call(2, 8, trap % 2 ? 1 : 8, Boxes::kCrops);
      call.f.n_blocks = 1;
      std::fill_n(call.mask.data, call.mask.count, true);
      call.blocks = Buffer<int32_t>(8), call.sources = Buffer<int32_t>(4);
      for (int i = 0; i < 8; ++i) call.blocks[i] = i % 4 < 2 ? 0 : 8;  // the first patch
      for (int i = 0; i < 4; ++i) call.sources[i] = 0;
      call.f.blocks = call.blocks.data, call.f.sources = call.sources.data;
      const int32_t kinds[] = {kOther, kOther, kShuffle, kShuffle, kShuffle, kNoise, kNoise};
      call.kind[0] = kZeros, call.kind[1] = kinds[trap];
      call.partner[1] = trap == 0 ? 2 : -1;
      if (trap == 2) call.sources[2] = -1;
      if (trap == 3) call.sources[3] = call.v.out_w - 7;
      if (trap == 4) call.sources[2] = INT32_MAX - 7;
      call.ids[1] = trap == 5 ? -1 : kMaxImageId;
      Buffer<float> tokens(2 * static_cast<size_t>(call.v.patches()) * call.v.row_length());
      CHECK((run_gather<uint8_t, float>(call, wide, tokens.data)));
      call.kind[1] = kZeros;
      CHECK((!run_gather<uint8_t, float>(call, wide, tokens.data)));
      call.kind[1] = trap % 2 ? 4 : -1;
      CHECK((run_gather<uint8_t, float>(call, wide, tokens.data)));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned first = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 1;
  for (unsigned seed = first; seed < (argc > 1 ? first + 1 : 3); ++seed) {
    draws.seed(seed);
    test_divisors();
    test_traps();
    test_all<uint8_t, float>();
    test_all<uint8_t, BFloat16>();
    test_all<uint8_t, Float16>();
    test_all<uint16_t, float>();
    test_all<uint16_t, BFloat16>();
    test_all<float, Float16>();
    test_all<float, float>();
  }
  std::puts("emulated CUDA: the arithmetic of core/views.h");
}
