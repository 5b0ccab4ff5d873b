// The entry points of the fused input path. All outputs are written in full, whatever they held.
#pragma once

#include "core/views.h"

namespace spcxr {

// --- CPU: images [begin, end) of the batch, one thread; the caller shares out the images.

// tokens [B, N, C*P*P]: the views cut into patches, hidden pixels replaced.
void masked_patch_gather_cpu(const Views& views, const Fill& fill, int64_t begin, int64_t end,
                             void* tokens, TokenType type);

// cu_seqlens [B + 1]: visible patches before each image; mask [B, N], true = hidden.
void count_visible_cpu(const bool* mask, int64_t count, int32_t patches, int32_t* cu_seqlens);

// tokens [T, C*P*P] and ids [T] of the visible patches, in order, from row cu_seqlens[b] on.
void visible_patch_gather_cpu(const Views& views, const bool* mask, const int32_t* cu_seqlens,
                              int64_t begin, int64_t end, void* tokens, TokenType type,
                              int32_t* ids);

struct LossLaw {
  Distance distance;
  bool normalise_patches;
};

// Adds nothing up over images: sums and counts [B] get each image's distances and the number of its
// hidden elements (pixels times channels). predicted [B, N, C*P*P] is of `type`; slope (null: not
// wanted) has its shape: int8 signs of kL1, float32 errors of kMSE, 0 where not hidden.
void masked_reconstruction_loss_cpu(const Views& views, const bool* mask, int32_t unit,
                                    const void* predicted, TokenType type, const LossLaw& law,
                                    int64_t begin, int64_t end, double* sums, int64_t* counts,
                                    void* slope);

// gradient = slope * factor, elements [begin, end) of `count`; the slopes are int8 or float32.
void reconstruction_gradient_cpu(const void* slope, bool signs, float factor, int64_t count,
                                 int64_t begin, int64_t end, void* gradient, TokenType type);

// The instruction set that serves: portable, avx2, avx512 or avx512_bf16. SPCXR_CPU_ISA, read once,
// asks for a lesser one; null when it names one this CPU or this build does not have.
const char* cpu_isa();

// --- CUDA: the whole batch; all pointers are on the device. Null, or CUDA's error text.

const char* masked_patch_gather_cuda(const Views& views, const Fill& fill, void* tokens,
                                     TokenType type, void* cuda_stream);
// `rows` rows of tokens and ids are written: those past cu_seqlens[B] with zeros and -1, and visible
// patches past `rows` not at all. Fills cu_seqlens [B + 1] too.
const char* visible_patch_gather_cuda(const Views& views, const bool* mask, int64_t rows,
                                      void* tokens, TokenType type, int32_t* ids,
                                      int32_t* cu_seqlens, void* cuda_stream);
// loss and weight [1] float32: the mean distance, and what times slope is its gradient; `scratch`
// holds 2 * B doubles (sums and counts of the images).
const char* masked_reconstruction_loss_cuda(const Views& views, const bool* mask, int32_t unit,
                                            const void* predicted, TokenType type,
                                            const LossLaw& law, double* scratch, float* loss,
                                            float* weight, void* slope, void* cuda_stream);
// factor [1] float32 stands on the device.
const char* reconstruction_gradient_cuda(const void* slope, bool signs, const float* factor,
                                         int64_t count, void* gradient, TokenType type,
                                         void* cuda_stream);

}  // namespace spcxr
