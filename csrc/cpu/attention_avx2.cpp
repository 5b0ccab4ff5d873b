#define SPCXR_ISA avx2
#include "cpu/attention_body.h"
