// The kernels of one instruction set. csrc/cpu/isa_*.cpp compile one table each.

#pragma once

#include <cstdint>

#include "cpu/add_layer_norm.h"
#include "cpu/attention.h"

namespace encoder_fast::cpu {

struct Kernels {
    void (*attend)(const AttentionArguments&, const AttentionTask&, float* workspace);
    void (*add_layer_norm)(const AddLayerNormArguments&, int64_t first_row, int64_t last_row);
};

// From the least to the most; each runs where the ones before it do.
enum Isa : int { kNone = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

extern const Kernels kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;

// The most that this processor has.
Isa best_isa();

const Kernels& kernels_of(int isa);

}  // namespace encoder_fast::cpu
