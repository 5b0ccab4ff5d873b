// Masked attention in bfloat16 products with sums in float, in namespace SPCXR_ISA: the including
// file names it and gives the products, CMake its compiler flags. The softmax is in float; its
// weights, and in the backward pass their gradients, are rounded to bfloat16 to be multiplied. What
// is inline in a header must not leave this object file, as in kernels_body.h.
#include "cpu/attention.h"

#include "cpu/attention_tiles_backward.h"
#include "cpu/attention_tiles_forward.h"
#include "cpu/kernels.h"

namespace spcxr {
namespace SPCXR_ISA {
namespace {

bool serves(TokenType type, int32_t dim) {
  return type == TokenType::kBFloat16 && dim > 0 && dim % kBlock == 0 && dim <= kMostDim;
}

void forward(const Attention& a, int64_t begin, int64_t end, void* out, float* lse) {
  Parts counted(nullptr);
  Forward(counted, a, out, lse);
  Parts parts(thread_scratch(counted.used()));
  Forward forward(parts, a, out, lse);
  const WithoutSubnormals without_subnormals;
  const TileUse tiles;
  for (int64_t pair = begin; pair < end; ++pair) {
    forward(pair, pair + 1 < end ? pair + 1 : pair);
  }
}

void backward(const Attention& a, const AttentionGradient& g, int64_t begin, int64_t end) {
  Parts counted(nullptr);
  Backward(counted, a, g);
  Parts parts(thread_scratch(counted.used()));
  Backward backward(parts, a, g);
  const WithoutSubnormals without_subnormals;
  const TileUse tiles;
  for (int64_t pair = begin; pair < end; ++pair) {
    backward(pair, pair + 1 < end ? pair + 1 : pair);
  }
}

}  // namespace

const AttentionKernels attention_kernels{serves, forward, backward};

}  // namespace SPCXR_ISA
}  // namespace spcxr
