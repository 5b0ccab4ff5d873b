// The CPU's entry points of the fused input path, the scratch of a thread, and the counts.
#include "core/patch_gather.h"

#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace spcxr {
namespace {

// The instruction set that serves here: tiles have nothing for pixels.
Isa gather_isa() {
  return serving_isa() == Isa::kAmx ? Isa::kAvx512Bf16 : serving_isa();
}

const Kernels& served() {
  switch (gather_isa()) {
#ifdef SPCXR_X86_KERNELS
    case Isa::kAvx512Bf16:
      return avx512_bf16::kernels;
    case Isa::kAvx512:
      return avx512::kernels;
    case Isa::kAvx2:
      return avx2::kernels;
#endif
    default:
      return portable::kernels;
  }
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace

void* thread_scratch(size_t bytes) {
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t held = 0;
  if (bytes > held) {
    held = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, held));
    if (memory == nullptr) std::abort();
    std::memset(memory.get(), 0, held);
  }
  return memory.get();
}

void masked_patch_gather_cpu(const Views& views, const Fill& fill, int64_t begin, int64_t end,
                             void* tokens, TokenType type) {
  served().masked_patch_gather(views, fill, begin, end, tokens, type);
}

void visible_patch_gather_cpu(const Views& views, const bool* mask, const int32_t* cu_seqlens,
                              int64_t begin, int64_t end, void* tokens, TokenType type,
                              int32_t* ids) {
  served().visible_patch_gather(views, mask, cu_seqlens, begin, end, tokens, type, ids);
}

void masked_reconstruction_loss_cpu(const Views& views, const bool* mask, int32_t unit,
                                    const void* predicted, TokenType type, const LossLaw& law,
                                    int64_t begin, int64_t end, double* sums, int64_t* counts,
                                    void* slope) {
  served().masked_reconstruction_loss(views, mask, unit, predicted, type, law, begin, end, sums,
                                      counts, slope);
}

void reconstruction_gradient_cpu(const void* slope, bool signs, float factor, int64_t count,
                                 int64_t begin, int64_t end, void* gradient, TokenType type) {
  served().reconstruction_gradient(slope, signs, factor, count, begin, end, gradient, type);
}

void count_visible_cpu(const bool* mask, int64_t count, int32_t patches, int32_t* cu_seqlens) {
  int32_t seen = 0;
  cu_seqlens[0] = 0;
  for (int64_t b = 0; b < count; ++b) {
    for (int32_t n = 0; n < patches; ++n) seen += !flag(mask, b * patches + n);
    cu_seqlens[b + 1] = seen;
  }
}

const char* cpu_isa() { return isa_name(gather_isa()); }

}  // namespace spcxr
