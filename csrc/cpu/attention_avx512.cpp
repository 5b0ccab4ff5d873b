#define SPCXR_ISA avx512
#include "cpu/attention_body.h"
