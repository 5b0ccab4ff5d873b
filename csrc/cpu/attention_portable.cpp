#define SPCXR_ISA portable
#include "cpu/attention_body.h"
