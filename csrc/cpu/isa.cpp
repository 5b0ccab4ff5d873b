#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#include "cpu/attention.h"

namespace spcxr {
namespace {

bool here(Isa isa) {
#ifdef SPCXR_X86_KERNELS
  switch (isa) {
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return here(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::kAvx512Bf16:
      return here(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
#ifdef SPCXR_TILE_KERNELS
    case Isa::kAmx:
      return here(Isa::kAvx512Bf16) && amx::permitted();
#endif
    default:
      break;
  }
#endif
  return isa == Isa::kPortable;
}

Isa choose() {
  const char* const asked = std::getenv("SPCXR_CPU_ISA");
  const Isa falling[] = {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kPortable};
  for (const Isa isa : falling) {
    const bool wanted =
        asked == nullptr || *asked == 0 || std::strcmp(asked, isa_name(isa)) == 0;
    if (wanted && here(isa)) return isa;
  }
  return Isa::kNone;
}

}  // namespace

Isa serving_isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
    default:
      return nullptr;
  }
}

}  // namespace spcxr
