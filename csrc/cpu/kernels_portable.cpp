#define SPCXR_ISA portable
#include "cpu/kernels_body.h"
