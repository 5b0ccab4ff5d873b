#define SPCXR_ISA amx
#define SPCXR_HD inline __attribute__((always_inline))
#include "cpu/tile_ops_amx.h"

#include "cpu/encoder_body.h"
