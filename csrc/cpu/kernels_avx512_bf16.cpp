#define SPCXR_ISA avx512_bf16
#include "cpu/kernels_body.h"
