#define SPCXR_ISA avx512
#include "cpu/kernels_body.h"
