// One head's rows, and how they become the right sides of products (tile_product.h).
#pragma once

#include "core/attention.h"
#include "cpu/parts.h"
#include "cpu/tile_lanes.h"
#include "cpu/tile_product.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

constexpr int32_t kMostDim = 128;
alignas(64) constexpr uint16_t kZeroRow[kMostDim] = {};

constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;

inline float size_of(float value) { return value < 0 ? -value : value; }
inline int32_t padded(int32_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// From a row of so many floats or bfloat16, a multiple of 32, to the next: an odd number of cache
// lines, so that a column of rows does not share its sets.
inline int64_t float_pitch(int32_t wide) { return int64_t{wide} + 16; }
inline int64_t half_pitch(int32_t wide) { return int64_t{wide} | 32; }

template <typename Element>
struct RowsOf {
  Element* first;
  int64_t pitch;
  Element* operator[](int64_t i) const { return first + i * pitch; }
};
using Rows = RowsOf<const uint16_t>;

// Where a (sequence, head) lies.
struct Head {
  int64_t sequence, first_row;  // of out
  int32_t head, length, dim;
  Rows q, k, v;
  const uint16_t *q_bias, *k_bias, *v_bias;  // or null

  Head(const Attention& a, int64_t pair)
      : sequence(pair / a.heads),
        first_row(a.first_row(sequence)),
        head(int32_t(pair % a.heads)),
        length(a.length(sequence)),
        dim(a.dim),
        q(rows<const uint16_t>(a, a.q, a.q_strides)),
        k(rows<const uint16_t>(a, a.k, a.k_strides)),
        v(rows<const uint16_t>(a, a.v, a.v_strides)),
        q_bias(bias(a, 0)),
        k_bias(bias(a, 1)),
        v_bias(bias(a, 2)) {}

  template <typename Element, typename Void>
  RowsOf<Element> rows(const Attention& a, Void* of, const Strides& strides) const {
    return {static_cast<Element*>(of) + a.first_element(strides, sequence, head), strides.token};
  }
  // Rows of [total, heads * dim].
  template <typename Element, typename Void>
  RowsOf<Element> dense_rows(const Attention& a, Void* of) const {
    const int64_t width = int64_t{a.heads} * dim;
    return {static_cast<Element*>(of) + first_row * width + head * dim, width};
  }

 private:
  const uint16_t* bias(const Attention& a, int64_t which) const {
    if (a.bias == nullptr) return nullptr;
    return static_cast<const uint16_t*>(a.bias) + (which * a.heads + head) * dim;
  }
};

// Asks for the rows of the (sequence, head) that is worked on next. A head's rows are short and far
// apart, so that no prefetcher of the hardware's sees them coming.
class Ahead {
 public:
  void clear() { count_ = length_ = 0; }
  void open(const Head& head) {
    clear();
    length_ = head.length;
    bytes_ = head.dim * int32_t{sizeof *head.q.first};
    add(head.q);
    add(head.k);
    add(head.v);
  }
  void add(const Rows& rows) { rows_[count_++] = rows; }
  void row(int32_t i) const {
    if (i >= length_) return;
    for (int32_t n = 0; n < count_; ++n) {
      const char* const row = reinterpret_cast<const char*>(rows_[n][i]);
      for (int32_t at = 0; at < bytes_; at += 64) __builtin_prefetch(row + at, 0, 2);
    }
  }

 private:
  Rows rows_[4];
  int32_t count_ = 0, length_ = 0, bytes_ = 0;
};

// The keys that are not masked.
struct VisibleKeys {
  int32_t* ids;
  int32_t count = 0;

  VisibleKeys(Parts& parts, const Attention& a) : ids(parts.take<int32_t>(a.n_max)) {}

  void find(const Attention& a, int64_t sequence) {
    const int32_t length = a.length(sequence);
    const uint32_t* const words =
        a.key_bits == nullptr ? nullptr : a.key_bits + sequence * a.key_words();
    int32_t found = 0;
    for (int32_t j = 0; j < length; j += 32) {
      uint32_t seen = words == nullptr ? ~0u : ~words[j / 32];
      if (length - j < 32) seen &= (1u << (length - j)) - 1;
      for (; seen != 0; seen &= seen - 1) ids[found++] = j + __builtin_ctz(seen);
    }
    count = found;
  }
  int32_t wide() const { return padded(count); }
  const uint16_t* row(const Rows& rows, int32_t n) const {
    return n < count ? rows[ids[n]] : kZeroRow;
  }
};

// What these functions write could be what a reference refers to, for all that the compiler knows:
// arguments are values, which it keeps in registers.

// Neighbours along a row are a pair, rows are columns: [wide / 16][dim / 32] tiles, for x rows^T.
[[gnu::noinline]] inline void pack_transposed(const VisibleKeys keys, const Rows rows, int32_t dim,
                                              uint16_t* to) {
  for (int32_t j = 0, wide = keys.wide(); j < wide; j += 16) {
    const uint16_t* row[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) row[i] = keys.row(rows, j + i);
    for (int32_t d = 0; d < dim; d += kDepth, to += kTile) {
      Words tile[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) tile[i] = load<Words>(row[i] + d);
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store(to + i * 2 * kLanes, tile[i]);
    }
  }
}

inline Words pair_of_rows(const uint16_t* one, const uint16_t* next) {
  return widened(one) | widened(next) << 16;
}

// Neighbouring rows are a pair: [dim / 16][wide / 32] tiles, for x rows.
[[gnu::noinline]] inline void pack_straight(const VisibleKeys keys, const Rows rows, int32_t dim,
                                            uint16_t* to) {
  const int32_t wide = keys.wide();
  const int64_t column = int64_t{wide} * kLanes;
  for (int32_t j = 0; j < wide; j += 2) {
    const uint16_t *const one = keys.row(rows, j), *const next = keys.row(rows, j + 1);
    uint16_t* place = to + int64_t{j / kDepth} * kTile + j % kDepth * kLanes;
    for (int32_t d = 0; d < dim; d += kLanes, place += column) {
      store(place, pair_of_rows(one + d, next + d));
    }
  }
}

// A block of `count` query rows, the rest zeros: each plus `bias`, or its opposite.
[[gnu::noinline]] inline void load_block(const Rows rows, int32_t count, int32_t dim,
                                         const uint16_t* bias, bool opposite, uint16_t* to) {
  const uint32_t flip = opposite ? 0x80008000u : 0;
  for (int32_t r = 0; r < count; ++r) {
    const uint16_t* const row = rows[r];
    for (int32_t d = 0; d < dim; d += kDepth, to += kDepth) {
      Words pairs = load<Words>(row + d);
      if (bias != nullptr) {
        const Words more = load<Words>(bias + d);
        pairs = paired(rounded(even(pairs) + even(more), odd(pairs) + odd(more)));
      }
      store(to, pairs ^ flip);
    }
  }
  for (int32_t left = (kBlock - count) * dim; left > 0; left -= kDepth, to += kDepth) {
    store(to, Words{});
  }
}

// The lanes' sum is the rows' inner product.
inline Floats products(const uint16_t* x, const uint16_t* y, int32_t dim) {
  Floats sum{};
  for (int32_t d = 0; d < dim; d += kDepth) {
    const Words a = load<Words>(x + d), b = load<Words>(y + d);
    sum = sum + even(a) * even(b) + odd(a) * odd(b);
  }
  return sum;
}

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
