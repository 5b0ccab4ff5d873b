#define SPCXR_ISA avx2
#include "cpu/kernels_body.h"
