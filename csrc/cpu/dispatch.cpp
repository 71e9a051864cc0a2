#include "cpu/kernels.h"

namespace encoder_fast::cpu {

Isa best_isa() {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (!avx2) return kNone;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!avx512) return kAvx2;
    return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
}

const Kernels& kernels_of(int isa) {
    switch (isa) {
        case kAvx512Bf16: return kAvx512Bf16Kernels;
        case kAvx512: return kAvx512Kernels;
        default: return kAvx2Kernels;
    }
}

}  // namespace encoder_fast::cpu
