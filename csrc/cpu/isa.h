// Which instruction set serves this process.
#pragma once

namespace spcxr {

// In rising order: each has what those before it have.
enum class Isa { kNone, kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The best that this CPU and this build have, or a lesser one that SPCXR_CPU_ISA, read once, asks
// for; kNone when it names one they do not have.
Isa serving_isa();

const char* isa_name(Isa isa);  // null for kNone

}  // namespace spcxr
