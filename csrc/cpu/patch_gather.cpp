#include "core/patch_gather.h"

#include <vector>

namespace spcxr {
namespace {

uint16_t to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

uint16_t to_float16(float value) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
  if (size > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u | (size >> 13 & 0x3FFu));
  if (size >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  // Below the least normal number: adding 0.5 leaves the rounded value in the lowest bits.
  if (size < 0x38800000u) {
    return static_cast<uint16_t>(sign |
                                 (float_to_bits(bits_to_float(size) + 0.5f) - 0x3F000000u));
  }
  return static_cast<uint16_t>(sign | ((size + 0xC8000FFFu + (size >> 13 & 1u)) >> 13));
}

float from_float16(uint16_t half) {
  const uint32_t sign = uint32_t{half} << 16 & 0x80000000u, size = (half & 0x7FFFu) << 13;
  // 2**112 brings the exponent from one bias to the other, and is exact; all ones stay all ones.
  const float value = bits_to_float(size) * 5.192296858534828e33f;
  const uint32_t bits = size >= 0x0F800000u ? size | 0x7F800000u : float_to_bits(value);
  return bits_to_float(sign | bits);
}

void store(void* tokens, TokenType type, int64_t at, float value) {
  if (type == TokenType::kFloat32) {
    static_cast<float*>(tokens)[at] = value;
  } else {
    static_cast<uint16_t*>(tokens)[at] =
        type == TokenType::kBFloat16 ? to_bfloat16(value) : to_float16(value);
  }
}

float load(const void* tokens, TokenType type, int64_t at) {
  if (type == TokenType::kFloat32) return static_cast<const float*>(tokens)[at];
  const uint16_t bits = static_cast<const uint16_t*>(tokens)[at];
  return type == TokenType::kBFloat16 ? bits_to_float(uint32_t{bits} << 16) : from_float16(bits);
}

struct Element {
  int32_t channel, row, column;
};

Element element(const Views& v, int32_t patch, int32_t e) {
  const int32_t area = v.patch * v.patch, inside = e % area;
  return Element{e / area, patch / v.grid_w() * v.patch + inside / v.patch,
                 patch % v.grid_w() * v.patch + inside % v.patch};
}

float clean(const Views& v, int64_t b, Element at) {
  return view_value(v, b, row_axis(v, b), column_axis(v, b), at.channel, at.row, at.column);
}

float filled(const Views& v, const Fill& f, int64_t b, int32_t patch, int32_t e) {
  const Element at = element(v, patch, e);
  if (!is_hidden(v, f, b, at.row, at.column)) return clean(v, b, at);
  if (f.kind[b] == kNoise) return noise_value(v, f, b, patch, e);
  if (f.kind[b] == kZeros) return 0;
  if (f.kind[b] == kOther) return clean(v, f.partner[b], at);
  const Place from = shuffled(f, b, at.row, at.column);
  return clean(v, b, Element{at.channel, from.row, from.column});
}

}  // namespace

void masked_patch_gather_cpu(const Views& v, const Fill& f, int64_t begin, int64_t end,
                             void* tokens, TokenType type) {
  for (int64_t b = begin; b < end; ++b)
    for (int32_t n = 0; n < v.patches(); ++n)
      for (int32_t e = 0; e < v.row_length(); ++e) {
        store(tokens, type, (b * v.patches() + n) * v.row_length() + e, filled(v, f, b, n, e));
      }
}

void count_visible_cpu(const bool* mask, int64_t count, int32_t patches, int32_t* cu_seqlens) {
  int32_t seen = 0;
  cu_seqlens[0] = 0;
  for (int64_t b = 0; b < count; ++b) {
    for (int32_t n = 0; n < patches; ++n) seen += !mask[b * patches + n];
    cu_seqlens[b + 1] = seen;
  }
}

void visible_patch_gather_cpu(const Views& v, const bool* mask, const int32_t* cu_seqlens,
                              int64_t begin, int64_t end, void* tokens, TokenType type,
                              int32_t* ids) {
  for (int64_t b = begin; b < end; ++b) {
    int64_t row = cu_seqlens[b];
    for (int32_t n = 0; n < v.patches(); ++n) {
      if (mask[b * v.patches() + n]) continue;
      for (int32_t e = 0; e < v.row_length(); ++e) {
        store(tokens, type, row * v.row_length() + e, clean(v, b, element(v, n, e)));
      }
      ids[row++] = n;
    }
  }
}

int64_t count_hidden_cpu(const Views& v, const bool* mask, int32_t unit, int64_t begin,
                         int64_t end) {
  if (mask == nullptr) return 0;
  const int64_t cells = int64_t{v.out_h / unit} * (v.out_w / unit);
  int64_t hidden = 0;
  for (int64_t i = begin * cells; i < end * cells; ++i) hidden += mask[i];
  return hidden * unit * unit * v.channels;
}

void masked_reconstruction_loss_cpu(const Views& v, const bool* mask, int32_t unit,
                                    const void* predicted, TokenType type, const LossLaw& law,
                                    int64_t begin, int64_t end, double* sums, void* gradient) {
  Fill f{};
  f.mask = mask;
  f.unit = unit;
  const int32_t length = v.row_length();
  std::vector<float> target(length);
  for (int64_t b = begin; b < end; ++b) {
    double sum = 0;
    for (int32_t n = 0; n < v.patches(); ++n) {
      double mean = 0, square = 0;
      for (int32_t e = 0; e < length; ++e) {
        target[e] = clean(v, b, element(v, n, e));
        mean += target[e];
      }
      mean /= length;
      for (const float t : target) square += (t - mean) * (t - mean);
      const double variance = square / (length > 1 ? length - 1 : 1);
      for (int32_t e = 0; e < length; ++e) {
        const int64_t at = (b * v.patches() + n) * length + e;
        const Element where = element(v, n, e);
        float slope = 0;
        if (is_hidden(v, f, b, where.row, where.column)) {
          const float wanted =
              law.normalise_patches
                  ? static_cast<float>((target[e] - mean) / std::sqrt(variance + kPatchVarianceFloor))
                  : target[e];
          const float error = load(predicted, type, at) - wanted;
          sum += loss_value(law.distance, error);
          slope = law.weight * loss_slope(law.distance, error);
        }
        if (gradient != nullptr) store(gradient, type, at, slope);
      }
    }
    sums[b] = sum * law.weight;
  }
}

const char* cpu_isa() { return "portable"; }

}  // namespace spcxr
