// The linear layers of an encoder's block in use: what a call holds, and the entry points. Rows and
// weights are bfloat16, sums and what lies between two products are float.
//
//   norm_linear:  out = norm(tokens) W^T + b
//   residual_mlp: y = tokens + attended Wp^T + bp,  out = y + gelu(norm(y) W1^T + b1) W2^T + b2
//
// norm is LayerNorm over a row, gelu the exact one (x times the normal distribution's function).
#pragma once

#include <cstdint>

namespace spcxr {

// W [out, in] in the order that products read it, [out / 16][in / 32][16][16][2]: the pairs of
// neighbours along `in`, of sixteen columns. `in` and `out` are multiples of 32.
struct Linear {
  const uint16_t *weight, *bias;
  int32_t in, out;
};

struct Norm {
  const uint16_t *weight, *bias;
  float eps;
};

struct BlockEnd {
  Linear proj;
  Norm norm;
  Linear fc1, fc2;
};

// --- CPU: rows [begin, end); one thread. A row's numbers do not depend on the rows beside it.

void norm_linear_cpu(const Norm& norm, const Linear& linear, const uint16_t* tokens, int64_t begin,
                     int64_t end, uint16_t* out);
void residual_mlp_cpu(const BlockEnd& layers, const uint16_t* tokens, const uint16_t* attended,
                      int64_t begin, int64_t end, uint16_t* out);

// The instruction set that serves: amx or avx512_bf16. Null where there is no product of bfloat16:
// nothing serves then.
const char* encoder_isa();

}  // namespace spcxr
