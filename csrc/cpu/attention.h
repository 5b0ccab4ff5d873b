// The CPU kernels of core/attention.h, as tables: one for each instruction set.
#pragma once

#include "core/attention.h"

namespace spcxr {

struct AttentionKernels {
  bool (*serves)(TokenType type, int32_t dim);
  void (*forward)(const Attention& a, int64_t begin, int64_t end, void* out, float* lse);
  void (*backward)(const Attention& a, const AttentionGradient& g, int64_t begin, int64_t end);
};

// In float arithmetic, from attention_body.h; they serve every type and dim.
namespace portable {
extern const AttentionKernels attention_kernels;
}
namespace avx2 {
extern const AttentionKernels attention_kernels;
}
namespace avx512 {
extern const AttentionKernels attention_kernels;
}

// On bfloat16 products, where SPCXR_TILE_KERNELS says that they are built.
namespace avx512_bf16 {
extern const AttentionKernels attention_kernels;
}
namespace amx {
extern const AttentionKernels attention_kernels;
bool permitted();  // the CPU has tiles of bfloat16, and Linux lets this process use them
}

}  // namespace spcxr
