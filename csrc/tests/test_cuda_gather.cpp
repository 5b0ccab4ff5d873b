// The CUDA kernels of the fused input path, thread by thread on the CPU, against the arithmetic of
// core/views.h, on random calls. Run by ctest. An argument is the seed.
#include "cuda_emulation.h"

#include <cstdio>
#include <memory>
#include <random>

#include "cuda/patch_gather.cuh"
#include "cuda/reconstruction_loss.cuh"
#include "cuda/visible_patch_gather.cuh"

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
std::mt19937 draws(1);
char what[200] = "";  // the call that a failure names

int32_t whole(int32_t low, int32_t high) { return low + static_cast<int32_t>(draws() % (high - low + 1)); }
float real(float low, float high) { return low + (high - low) * static_cast<float>(draws() % 4097) / 4096; }

// Exactly `count` elements at a multiple of 16 bytes (or one element past it), so that a sanitizer
// sees the first byte before or after.
template <class T>
struct Buffer {
  std::unique_ptr<char[]> bytes;
  size_t count;
  T* data;

  explicit Buffer(size_t n, bool odd = false)
      : bytes(new char[(n + odd) * sizeof(T) + 1]), count(n),
        data(reinterpret_cast<T*>(bytes.get()) + odd) {
    std::memset(bytes.get(), 0xA5, (n + odd) * sizeof(T));
  }
  T& operator[](size_t i) { return data[i]; }
};

template <class T>
constexpr PixelType pixel_type =
    sizeof(T) == 1 ? PixelType::kUInt8 : sizeof(T) == 2 ? PixelType::kUInt16 : PixelType::kFloat32;

enum class Boxes { kNone, kFlips, kSame, kCrops, kWild };

// One random call.
template <class Pixel>
struct Call {
  Views v{};
  Fill f{};
  std::unique_ptr<Buffer<Pixel>> pixels;
  Buffer<float> boxes, scale, shift;
  Buffer<bool> flip, mask;
  Buffer<int32_t> kind, blocks, sources;
  Buffer<int64_t> partner, ids;

  Call(int64_t count, int32_t patch, int32_t unit, Boxes law)
      : boxes(4 * count), scale(count), shift(count), flip(count), mask(0), kind(count),
        blocks(0), sources(0), partner(count), ids(count) {
    const bool native = law <= Boxes::kSame;
    v.count = count;
    v.channels = whole(0, 1) * 2 + 1;
    v.patch = patch;
    const int32_t most = patch > 8 ? 3 : 5;
    v.out_h = patch * whole(1, most), v.out_w = patch * whole(1, most);
    v.source_h = native ? v.out_h : whole(1, 70), v.source_w = native ? v.out_w : whole(1, 70);
    v.row_stride = v.source_w + (whole(0, 1) ? 0 : whole(1, 9));
    v.channel_stride = v.row_stride * v.source_h + whole(0, 3);
    v.image_stride = v.channel_stride * v.channels;
    pixels.reset(new Buffer<Pixel>(count * v.image_stride, whole(0, 3) == 0));
    for (size_t i = 0; i < pixels->count; ++i) {
      (*pixels)[i] = static_cast<Pixel>(sizeof(Pixel) == 4 ? real(-2, 3) : real(0, 250));
    }
    v.pixels = pixels->data;
    v.pixel_type = pixel_type<Pixel>;
    for (int64_t b = 0; b < count; ++b) {
      scale[b] = real(-0.02f, 0.02f), shift[b] = real(-1, 1);
      set_box(b, law);
    }
    v.boxes = law <= Boxes::kFlips ? nullptr : boxes.data;
    v.flip = law == Boxes::kNone ? nullptr : flip.data;
    v.scale = scale.data, v.shift = shift.data;
    hide(unit);
  }

  void set_box(int64_t b, Boxes law) {
    float* box = &boxes[b * 4];
    flip[b] = law != Boxes::kSame && whole(0, 1);
    box[0] = box[1] = 0;
    box[2] = static_cast<float>(v.source_h), box[3] = static_cast<float>(v.source_w);
    if (law == Boxes::kCrops && whole(0, 4) != 0) {
      for (int axis = 0; axis < 2; ++axis) {
        const float side = box[2 + axis];
        box[2 + axis] = real(0.05f, 1) * side;
        box[axis] = real(0, 1) * (side - box[2 + axis]);
      }
    }
    if (law == Boxes::kWild) {
      const float wild[] = {NAN, INFINITY, -INFINITY, 1e30f, -1e30f, 0, -3, 5, 1e9f};
      for (int i = 0; i < 4; ++i) box[i] = wild[whole(0, 8)];
    }
  }

  void hide(int32_t unit) {
    f.unit = unit;
    const int64_t cells = v.count * (v.out_h / unit) * (v.out_w / unit);
    mask = Buffer<bool>(cells);
    const int law = whole(0, 5);  // all, none, some
    for (int64_t i = 0; i < cells; ++i) mask[i] = law == 0 || (law > 1 && whole(0, 1));
    f.mask = mask.data;
    f.n_blocks = whole(0, 3) == 0 ? 300 : whole(0, 9);
    blocks = Buffer<int32_t>(v.count * f.n_blocks * 4);
    sources = Buffer<int32_t>(v.count * f.n_blocks * 2);
    for (int64_t i = 0; i < v.count * f.n_blocks; ++i) {
      const int32_t h = whole(0, v.out_h), w = whole(1, v.out_w);
      int32_t* block = &blocks[i * 4];
      block[0] = whole(0, v.out_h - h), block[1] = whole(0, v.out_w - w);
      block[2] = h, block[3] = h == 0 ? 0 : w;
      sources[i * 2] = whole(0, v.out_h - h), sources[i * 2 + 1] = whole(0, v.out_w - w);
    }
    for (int64_t b = 0; b < v.count; ++b) {
      kind[b] = whole(0, 3);
      partner[b] = whole(0, static_cast<int32_t>(v.count) - 1);
      ids[b] = whole(0, 1) ? kMaxImageId - 1 - b : b;
    }
    f.kind = kind.data, f.partner = partner.data;
    f.blocks = blocks.data, f.sources = sources.data;
    f.image_ids = ids.data, f.seed = (int64_t{7} << 32) + 5, f.epoch = 3, f.view = 1;
  }

  float view(int64_t b, int32_t channel, int32_t row, int32_t column) const {
    return view_value(v, b, row_axis(v, b), column_axis(v, b), channel, row, column);
  }
  bool exact(int64_t b) const { return row_axis(v, b).identity() && column_axis(v, b).identity(); }
};

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

template <class Pixel, class Token>
void run_gather(const Call<Pixel>& call, bool wide, Token* tokens) {
  const Layout layout = wide ? make_layout(call.v, 8, kDeep) : make_layout(call.v, 1, 1);
  const uint32_t a_block = kThreads * (wide ? 1 : 4);
  const auto an_image = static_cast<int32_t>((layout.pieces + a_block - 1) / a_block);
  const Divisor blocks = make_divisor(an_image);
  emulated::launch(static_cast<unsigned>(call.v.count * an_image), kThreads, [&] {
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
  run_gather(call, wide, tokens.data);
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
    mask[i] = whole(0, 2) == 0;
    if (!mask[i]) seen.push_back({i / n, static_cast<int32_t>(i % n)});
    if (i % n == n - 1) sums.push_back(static_cast<int32_t>(seen.size()));
  }
  const int64_t total = static_cast<int64_t>(seen.size()), rows = std::max<int64_t>(total + whole(-3, 5), 0);
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
std::vector<float> target_of(const Call<Pixel>& call, const LossLaw& law, int64_t b, int32_t patch) {
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
  const LossLaw law{whole(0, 1) ? Distance::kL1 : Distance::kMSE, whole(0, 1) == 1, 0};
  Buffer<Token> predicted(v.count * n * length), gradient(v.count * n * length);
  for (size_t i = 0; i < predicted.count; ++i) store_one(&predicted[i], real(-3, 3));
  Buffer<double> scratch(2 * v.count);
  float loss = NAN;
  const bool backward = whole(0, 3) != 0;
  int32_t lanes = 1;
  while (lanes < length / (wide ? 8 : 1) && lanes < 32) lanes *= 2;
  Fill hidden{};
  hidden.mask = call.f.mask, hidden.unit = unit;
  const LossCall<Token> what_to{hidden, law, lanes, predicted.data, backward ? gradient.data : nullptr,
                                scratch.data, scratch.data + v.count};
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
  emulated::launch(1, kThreads, [&] { sum_losses_kernel(what_to.sums, v.count, &loss); });

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
    const float slope = counts ? loss_slope(law.distance, error) * weight : 0;
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
    std::snprintf(what, sizeof what, "B %d C %d %dx%d to %dx%d P %d unit %d boxes %d, pixel %zu token %zu",
                  static_cast<int>(count), call.v.channels, call.v.source_h, call.v.source_w,
                  call.v.out_h, call.v.out_w, patch, unit, static_cast<int>(law), sizeof(Pixel),
                  sizeof(Token));
    test_gather<Pixel, Token>(call, wide, compare);
    test_visible<Pixel, Token>(call, wide, compare);
    if (compare) test_loss<Pixel, Token>(call, wide);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) draws.seed(static_cast<unsigned>(std::atoi(argv[1])));
  test_all<uint8_t, float>();
  test_all<uint8_t, BFloat16>();
  test_all<uint8_t, Float16>();
  test_all<uint16_t, float>();
  test_all<uint16_t, BFloat16>();
  test_all<float, Float16>();
  test_all<float, float>();
  std::puts("emulated CUDA: the arithmetic of core/views.h");
}
