// The CPU's entry points of the encoder's linear layers: which instruction set serves.
#include "cpu/encoder.h"

#include "cpu/isa.h"

namespace spcxr {
namespace {

const EncoderKernels* serving() {
#ifdef SPCXR_TILE_KERNELS
  if (serving_isa() == Isa::kAmx) return &amx::encoder_kernels;
  if (serving_isa() == Isa::kAvx512Bf16) return &avx512_bf16::encoder_kernels;
#endif
  return nullptr;
}

}  // namespace

void norm_linear_cpu(const Norm& norm, const Linear& linear, const uint16_t* tokens, int64_t begin,
                     int64_t end, uint16_t* out) {
  serving()->norm_linear(norm, linear, tokens, begin, end, out);
}

void residual_mlp_cpu(const BlockEnd& layers, const uint16_t* tokens, const uint16_t* attended,
                      int64_t begin, int64_t end, uint16_t* out) {
  serving()->residual_mlp(layers, tokens, attended, begin, end, out);
}

const char* encoder_isa() {
  return serving() == nullptr ? nullptr : isa_name(serving_isa());
}

}  // namespace spcxr
