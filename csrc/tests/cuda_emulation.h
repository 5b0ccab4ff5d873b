// Enough of CUDA to run a kernel on the CPU: every device thread is a thread, barriers are barriers.
// For logic and (with -fsanitize=thread) races, on machines without a GPU. No device intrinsics
// beyond those below.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

#define __global__
#define __shared__ static  // one block at a time
#define __launch_bounds__(threads)

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
  int32_t lanes[32];
};

inline thread_local Dim threadIdx, blockIdx;
inline Barrier* block_barrier;
inline std::vector<Warp*> warps;

template <class Body>
void launch(unsigned blocks, unsigned threads, const Body& body) {
  for (unsigned block = 0; block < blocks; ++block) {
    Barrier barrier(threads);
    block_barrier = &barrier;
    for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(new Warp);
    std::vector<std::thread> crew;
    for (unsigned t = 0; t < threads; ++t) {
      crew.emplace_back([&, t] {
        threadIdx.x = t;
        blockIdx.x = block;
        body();
      });
    }
    for (auto& thread : crew) thread.join();
    for (Warp* warp : warps) delete warp;
    warps.clear();
  }
}

}  // namespace emulated

using emulated::blockIdx;
using emulated::threadIdx;

struct int4 {
  int32_t x, y, z, w;
};
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }

inline void __syncthreads() { emulated::block_barrier->wait(); }
inline void __trap() { std::abort(); }
inline void atomicAdd(int32_t* sum, int32_t value) { __atomic_fetch_add(sum, value, __ATOMIC_RELAXED); }

inline int32_t __reduce_add_sync(unsigned, int32_t value) {
  emulated::Warp& warp = *emulated::warps[threadIdx.x / 32];
  warp.lanes[threadIdx.x % 32] = value;
  warp.barrier.wait();
  int32_t sum = 0;
  for (const int32_t lane : warp.lanes) sum += lane;
  warp.barrier.wait();
  return sum;
}
