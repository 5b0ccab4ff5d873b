// The CPU's entry points of masked attention: which instruction set serves a call.
#include "cpu/attention.h"

#include "cpu/isa.h"

namespace spcxr {
namespace {

struct Offer {
  Isa isa;
  const AttentionKernels* kernels;
};

const Offer kPortable{Isa::kPortable, &portable::attention_kernels};

const Offer kOffers[] = {
#ifdef SPCXR_TILE_KERNELS
    {Isa::kAmx, &amx::attention_kernels},
    {Isa::kAvx512Bf16, &avx512_bf16::attention_kernels},
#endif
#ifdef SPCXR_X86_KERNELS
    {Isa::kAvx512, &avx512::attention_kernels},
    {Isa::kAvx2, &avx2::attention_kernels},
#endif
    kPortable,
};

const Offer& offer(TokenType type, int32_t dim) {
  for (const Offer& one : kOffers) {
    if (one.isa <= serving_isa() && one.kernels->serves(type, dim)) return one;
  }
  return kPortable;
}

}  // namespace

void masked_attention_cpu(const Attention& a, int64_t begin, int64_t end, void* out, float* lse) {
  offer(a.type, a.dim).kernels->forward(a, begin, end, out, lse);
}

void masked_attention_backward_cpu(const Attention& a, const AttentionGradient& g, int64_t begin,
                                   int64_t end) {
  offer(a.type, a.dim).kernels->backward(a, g, begin, end);
}

const char* attention_isa(TokenType type, int32_t dim) {
  return serving_isa() == Isa::kNone ? nullptr : isa_name(offer(type, dim).isa);
}

}  // namespace spcxr
