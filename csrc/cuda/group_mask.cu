#include "cuda/group_mask.cuh"

#include <cuda_runtime.h>

namespace spcxr {

const char* group_mask_cuda(const int64_t* image_ids, int64_t count, int64_t seed, int64_t epoch,
                            const Law& law, int32_t* blocks, bool* mask, void* cuda_stream) {
  if (count == 0) return nullptr;
  group_mask_kernel<<<static_cast<unsigned>(count), kThreads, 0,
                      static_cast<cudaStream_t>(cuda_stream)>>>(image_ids, seed, epoch, law, blocks,
                                                                mask);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace spcxr
