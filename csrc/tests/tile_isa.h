// Whether a test that is compiled once for each SPCXR_TILE_ISA can run here.
#pragma once

#include <cstdio>
#include <cstring>

#include "cpu/attention.h"

#define SPCXR_NAME_(isa) #isa
#define SPCXR_NAME(isa) SPCXR_NAME_(isa)

namespace {

constexpr const char* kName = SPCXR_NAME(SPCXR_TILE_ISA);
constexpr int kSkipped = 77;  // what a test returns that cannot run: CMake's SKIP_RETURN_CODE

inline bool asks_for_emulation(int argc, char** argv) {
  return argc > 1 && std::strcmp(argv[1], "emulated") == 0;
}

// Says so where this CPU cannot run the instructions themselves.
inline bool lacks_tiles() {
  const bool lanes = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (lanes && (std::strcmp(kName, "amx") != 0 || spcxr::amx::permitted())) return false;
  std::printf("skipped: this CPU or its system does not give %s\n", kName);
  return true;
}

}  // namespace
