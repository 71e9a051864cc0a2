#define KERNELS kAvx512Kernels
#include "cpu/isa_table.h"
