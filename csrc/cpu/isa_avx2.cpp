#define KERNELS kAvx2Kernels
#include "cpu/isa_table.h"
