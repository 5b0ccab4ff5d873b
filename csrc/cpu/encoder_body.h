// The encoder's linear layers (core/encoder.h) in namespace SPCXR_ISA: the including file names it
// and gives the products, CMake its compiler flags. What is inline in a header must not leave this
// object file, as in kernels_body.h.
//
// Rows go through all layers of a call in strips of kStrip (tile_ops_*.h): what lies between two
// products, the MLP's hidden rows above all, stays in the cache. The weights pass by once a strip.
#include "cpu/encoder.h"

#include <cstring>

#include "cpu/encoder_rows.h"
#include "cpu/kernels.h"
#include "cpu/parts.h"
#include "cpu/tile_product.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

inline int32_t least(int64_t a, int64_t b) { return int32_t(a < b ? a : b); }

// A strip of rows in scratch. Products may read rows past the last real one, and write none of it.
template <typename Element>
struct Strip {
  int64_t pitch;  // an odd number of cache lines: a column of rows does not share its sets
  Element* at;

  Strip(Parts& parts, int32_t wide)
      : pitch(int64_t{wide} | int64_t{64 / sizeof(Element)}),
        at(parts.take<Element>(kStrip * pitch)) {}
  Element* operator[](int32_t row) const { return at + row * pitch; }
};

// Calls put(row, column, low, high) with 32 numbers of a W^T + b at a time.
template <typename Put>
inline void multiply_strip(const Strip<uint16_t>& a, int32_t rows, const Linear& layer,
                           float* sums, const Put& put) {
  for (int32_t n = 0; n < layer.out; n += kBlock) {
    const Right weight{layer.weight + int64_t{n} * layer.in, int64_t{kLanes} * layer.in};
    const Floats low = floats(layer.bias + n), high = floats(layer.bias + n + kLanes);
    for (int32_t first = 0; first < rows; first += kBlock) {
      const int32_t some = least(rows - first, kBlock);
      multiply(some, layer.in / kDepth, Left{a[first], a.pitch}, weight, Sums{sums, kBlock}, false);
      const float* from = sums;
      for (int32_t r = first; r < first + some; ++r, from += kBlock) {
        put(r, n, floats(from) + low, floats(from + kLanes) + high);
      }
    }
  }
}

// The scratch of a call.
struct Work {
  Strip<uint16_t> rows, hidden;
  Strip<float> stream;
  float* sums;

  Work(Parts& parts, int32_t wide, int32_t hidden_wide)
      : rows(parts, wide),
        hidden(parts, hidden_wide),
        stream(parts, hidden_wide > 0 ? wide : 0),
        sums(parts.take<float>(kBlock * kBlock)) {}
};

// Calls work(scratch, first row, rows) for each strip.
template <typename EachStrip>
inline void in_strips(int32_t wide, int32_t hidden, int64_t begin, int64_t end,
                      const EachStrip& each) {
  Parts counted(nullptr);
  Work(counted, wide, hidden);
  Parts parts(thread_scratch(counted.used()));
  const Work work(parts, wide, hidden);
  const WithoutSubnormals without_subnormals;
  const TileUse tiles;
  for (int64_t first = begin; first < end; first += kStrip) {
    each(work, first, least(end - first, kStrip));
  }
}

void norm_linear(const Norm& norm, const Linear& linear, const uint16_t* tokens, int64_t begin,
                 int64_t end, uint16_t* out) {
  in_strips(linear.in, 0, begin, end, [&](const Work& work, int64_t first, int32_t rows) {
    for (int32_t r = 0; r < rows; ++r) {
      normalise(tokens + (first + r) * linear.in, linear.in, norm, work.rows[r]);
    }
    uint16_t* const strip = out + first * linear.out;
    multiply_strip(work.rows, rows, linear, work.sums,
                   [&](int32_t r, int32_t n, Floats low, Floats high) {
                     store(strip + int64_t{r} * linear.out + n, rounded(low, high));
                   });
  });
}

void residual_mlp(const BlockEnd& layers, const uint16_t* tokens, const uint16_t* attended,
                  int64_t begin, int64_t end, uint16_t* out) {
  const int32_t wide = layers.fc1.in;
  in_strips(wide, layers.fc1.out, begin, end, [&](const Work& work, int64_t first, int32_t rows) {
    const int64_t start = first * wide;
    for (int32_t r = 0; r < rows; ++r) {
      std::memcpy(work.rows[r], attended + start + int64_t{r} * wide, size_t(wide) * 2);
    }
    multiply_strip(work.rows, rows, layers.proj, work.sums,
                   [&](int32_t r, int32_t n, Floats low, Floats high) {
                     const uint16_t* const before = tokens + start + int64_t{r} * wide + n;
                     store(work.stream[r] + n, floats(before) + low);
                     store(work.stream[r] + n + kLanes, floats(before + kLanes) + high);
                   });
    for (int32_t r = 0; r < rows; ++r) {
      normalise(work.stream[r], wide, layers.norm, work.rows[r]);
    }
    multiply_strip(work.rows, rows, layers.fc1, work.sums,
                   [&](int32_t r, int32_t n, Floats low, Floats high) {
                     store(work.hidden[r] + n, rounded(gelu(low), gelu(high)));
                   });
    multiply_strip(work.hidden, rows, layers.fc2, work.sums,
                   [&](int32_t r, int32_t n, Floats low, Floats high) {
                     const float* const before = work.stream[r] + n;
                     store(out + start + int64_t{r} * wide + n,
                           rounded(floats(before) + low, floats(before + kLanes) + high));
                   });
  });
}

}  // namespace

const EncoderKernels encoder_kernels{norm_linear, residual_mlp};

}  // namespace SPCXR_ISA
}  // namespace spcxr
