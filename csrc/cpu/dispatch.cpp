#include <cpuid.h>

#include "cpu/kernels.h"

namespace encoder_fast::cpu {

namespace {

// __builtin_cpu_supports knows "f16c" from GCC 11 and Clang 18 on. That the system keeps such
// registers goes with AVX2.
bool has_f16c() {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

}  // namespace

Isa best_isa() {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
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
