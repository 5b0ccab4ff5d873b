#define SPCXR_ISA avx512_bf16
#define SPCXR_HD inline __attribute__((always_inline))
#include "cpu/tile_ops_avx512_bf16.h"

#include "cpu/encoder_body.h"
