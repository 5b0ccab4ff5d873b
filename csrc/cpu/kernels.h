// The kernels of patch_gather.h, compiled once for each instruction set from kernels_body.h.
#pragma once

#include <cstddef>

#include "core/patch_gather.h"

namespace spcxr {

struct Kernels {
  void (*masked_patch_gather)(const Views& views, const Fill& fill, int64_t begin, int64_t end,
                              void* tokens, TokenType type);
  void (*visible_patch_gather)(const Views& views, const bool* mask, const int32_t* cu_seqlens,
                               int64_t begin, int64_t end, void* tokens, TokenType type,
                               int32_t* ids);
  void (*masked_reconstruction_loss)(const Views& views, const bool* mask, int32_t unit,
                                     const void* predicted, TokenType type, const LossLaw& law,
                                     int64_t begin, int64_t end, double* sums, int64_t* counts,
                                     void* slope);
  void (*reconstruction_gradient)(const void* slope, bool signs, float factor, int64_t count,
                                  int64_t begin, int64_t end, void* gradient, TokenType type);
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}

// This thread's scratch, at least so large, aligned to 64 bytes; it grows and is kept. Holds no
// rubbish at first: memory that was never written is zero.
void* thread_scratch(size_t bytes);

}  // namespace spcxr
