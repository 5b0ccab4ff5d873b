// The CPU kernels of core/encoder.h, as tables: one for each instruction set with products of
// bfloat16, where SPCXR_TILE_KERNELS says that they are built.
#pragma once

#include "core/encoder.h"

namespace spcxr {

struct EncoderKernels {
  decltype(norm_linear_cpu)* norm_linear;
  decltype(residual_mlp_cpu)* residual_mlp;
};

namespace avx512_bf16 {
extern const EncoderKernels encoder_kernels;
}
namespace amx {
extern const EncoderKernels encoder_kernels;
}

}  // namespace spcxr
