#define KERNELS kAvx512Bf16Kernels
#include "cpu/isa_table.h"
