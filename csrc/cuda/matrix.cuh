// Warp-wide products on tensor cores, and shared memory by address: the PTX of the attention
// kernels. csrc/tests/matrix_emulation.h has a twin of each function.
#pragma once

#include "cuda/tokens.cuh"

namespace spcxr {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

#ifdef __CUDACC__
#define SPCXR_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint4 name[]

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// c += a b for a [16, 16], b [16, 8]. Lane l holds rows l / 4 and l / 4 + 8 of a and c, columns
// 2 (l % 4) and the next of every eight; of b, rows 2 (l % 4) and the next of every eight, column
// l / 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type").
__device__ inline void multiply_add(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply_add(Float16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of tokens, whose rows (16 bytes) lie where lanes 8 m to 8 m + 7 say. Of each,
// a lane gets row l / 4, columns 2 (l % 4) and the next; transposed, of the transposed matrix.
__device__ inline void load_matrices(uint32_t at, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(at)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t at, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(at)
               : "memory");
}

// 16 bytes into shared memory, there after the wait (of this thread; a barrier for the others).
__device__ inline void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ inline float power_of_two(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}
__device__ inline float log_of_two(float power) {
  float exponent;
  asm("lg2.approx.f32 %0, %1;" : "=f"(exponent) : "f"(power));
  return exponent;
}

// threadIdx.x, asked anew: the compiler does not keep it.
__device__ inline int32_t thread_number() {
  int32_t number;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
  return number;
}

// The same number; what is computed from it is computed here and no earlier.
template <class Number>
__device__ inline Number here(Number number) {
  asm volatile("" : "+r"(number));
  return number;
}
#endif

}  // namespace spcxr
