#define SPCXR_ISA portable
#include "cpu/kernels.inc"
