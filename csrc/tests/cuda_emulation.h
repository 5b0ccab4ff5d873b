// Enough of CUDA to run a kernel on the CPU: every device thread is a thread, barriers are barriers.
// For logic and (with -fsanitize=thread) races, on machines without a GPU. No device intrinsics
// beyond those below.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

namespace emulated {

struct Dim {
  unsigned x;
};

struct Barrier {
  pthread_barrier_t inner;
  explicit Barrier(unsigned threads) { pthread_barrier_init(&inner, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&inner); }
  void wait() { pthread_barrier_wait(&inner); }
};

struct Warp {
  Barrier barrier{32};
  double lanes[32];         // holds an int32_t too
  uint32_t words[2][32][6];  // see `share`
};

inline thread_local Dim threadIdx, blockIdx;
inline Dim blockDim;
inline Barrier* block_barrier;
inline std::vector<Warp*> warps;
inline unsigned char* dynamic_shared;  // exactly as many bytes as a launch asks for

struct Trap {};

// Whether a thread came to __trap(), where all of a block must come before the next barrier.
// Every block finds `bytes` of dynamic shared memory full of NaNs.
template <class Body>
bool traps(unsigned blocks, unsigned threads, const Body& body, size_t bytes = 0) {
  if (blocks == 0) return false;
  const std::unique_ptr<unsigned char[]> shared(new unsigned char[bytes]);
  dynamic_shared = shared.get();
  std::memset(dynamic_shared, 0xFF, bytes);
  std::atomic<bool> trapped{false};
  Barrier barrier(threads), next(threads);
  block_barrier = &barrier;
  blockDim.x = threads;
  for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(new Warp);
  std::vector<std::thread> crew;
  for (unsigned t = 0; t < threads; ++t) {
    crew.emplace_back([&, t] {
      threadIdx.x = t;
      for (unsigned block = 0; block < blocks; ++block) {
        blockIdx.x = block;
        try {
          body();
        } catch (const Trap&) {
          trapped = true;
        }
        next.wait();
        if (bytes == 0) continue;
        if (t == 0) std::memset(dynamic_shared, 0xFF, bytes);
        next.wait();
      }
    });
  }
  for (auto& thread : crew) thread.join();
  for (Warp* warp : warps) delete warp;
  warps.clear();
  return trapped;
}

template <class Body>
void launch(unsigned blocks, unsigned threads, const Body& body, size_t bytes = 0) {
  if (traps(blocks, threads, body, bytes)) std::abort();
}

// What the lanes of a warp exchange: `pick` finds in all 32 what a lane takes.
template <class T, class Pick>
T exchange(T value, const Pick& pick) {
  Warp& warp = *warps[threadIdx.x / 32];
  warp.lanes[threadIdx.x % 32] = value;
  warp.barrier.wait();
  const T taken = static_cast<T>(pick(warp.lanes));
  warp.barrier.wait();
  return taken;
}

// Up to six words of each lane to all of them: words[lane][i]. They stay until the warp has shared
// twice more: nobody can write over them before everyone has come to the next sharing.
inline thread_local unsigned share_turn = 0;
template <class... Words>
const uint32_t (*share(Words... mine))[6] {
  Warp& warp = *warps[threadIdx.x / 32];
  auto& words = warp.words[share_turn++ % 2];
  int i = 0;
  ((words[threadIdx.x % 32][i++] = mine), ...);
  warp.barrier.wait();
  return words;
}

}  // namespace emulated

using emulated::blockDim;
using emulated::blockIdx;
using emulated::threadIdx;

#define SPCXR_VECTOR(bytes) struct __attribute__((may_alias, aligned(bytes)))
SPCXR_VECTOR(8) int2 { int32_t x, y; };
SPCXR_VECTOR(8) uint2 { uint32_t x, y; };
SPCXR_VECTOR(16) int4 { int32_t x, y, z, w; };
SPCXR_VECTOR(16) uint4 { uint32_t x, y, z, w; };
SPCXR_VECTOR(16) float4 { float x, y, z, w; };
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class T>
T __ldg(const T* at) {
  return *at;
}
inline float __fdividef(float a, float b) { return a / b; }
inline int __ffs(int32_t bits) { return __builtin_ffs(bits); }
inline int __clz(int32_t bits) { return bits == 0 ? 32 : __builtin_clz(bits); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

inline void __syncthreads() { emulated::block_barrier->wait(); }
inline void __syncwarp() { emulated::warps[threadIdx.x / 32]->barrier.wait(); }
[[noreturn]] inline void __trap() { throw emulated::Trap{}; }
inline void atomicAdd(int32_t* sum, int32_t value) {
  __atomic_fetch_add(sum, value, __ATOMIC_RELAXED);
}
inline void atomicMax(int32_t* most, int32_t value) {
  int32_t held = __atomic_load_n(most, __ATOMIC_RELAXED);
  while (held < value && !__atomic_compare_exchange_n(most, &held, value, false, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {
  }
}

inline int32_t __reduce_add_sync(unsigned, int32_t value) {
  return emulated::exchange(value, [](const double* lanes) {
    double sum = 0;
    for (int i = 0; i < 32; ++i) sum += lanes[i];
    return sum;
  });
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
  const unsigned lane = threadIdx.x % 32;
  return emulated::exchange(
      value, [&](const double* lanes) { return lanes[lane < step ? lane : lane - step]; });
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulated::exchange(value, [&](const double* lanes) { return lanes[lane % 32]; });
}
inline bool __any_sync(unsigned, bool value) {
  return emulated::exchange<int32_t>(value, [](const double* lanes) {
    double sum = 0;
    for (int i = 0; i < 32; ++i) sum += lanes[i];
    return sum;
  }) != 0;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned step) {
  const unsigned lane = threadIdx.x % 32;
  return emulated::exchange(value, [&](const double* lanes) { return lanes[lane ^ step]; });
}

// The conversions of cuda/tokens.cuh: to nearest, ties to even.
namespace spcxr {

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline uint16_t to_float16(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(static_cast<double>(value));
  if (value != value) return 0x7FFF;
  if (size >= 65520) return sign | 0x7C00;
  if (size == 0) return sign;
  int exponent = 0;
  std::frexp(size, &exponent);  // size = [0.5, 1) * 2**exponent
  exponent = exponent < -13 ? -13 : exponent;
  const double step = std::ldexp(1.0, exponent - 11);
  const auto steps = static_cast<uint16_t>(std::nearbyint(size / step));  // 2048 carries by itself
  return static_cast<uint16_t>(sign | (((exponent + 13) << 10) + steps));
}
inline float from_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : std::ldexp(1024.0f + fraction, exponent - 25);
  return bits & 0x8000 ? -size : size;
}
inline uint32_t bfloat16x2(float low, float high) {
  return to_bfloat16(low) | static_cast<uint32_t>(to_bfloat16(high)) << 16;
}
inline uint32_t float16x2(float low, float high) {
  return to_float16(low) | static_cast<uint32_t>(to_float16(high)) << 16;
}
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }

}  // namespace spcxr
