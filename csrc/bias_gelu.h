// out = gelu(x + bias), gelu(v) = v / 2 * (1 + erf(v / sqrt(2))).

#pragma once

#include <cstdint>

#include "operands.h"

namespace encoder_fast {

struct BiasGeluArguments {
    Rows x;
    Vector bias;  // may be absent
    void* out;    // (rows, width), contiguous; may be x
    int64_t rows;
    int width;
    DType dtype;  // of x and out
};

void bias_gelu(const BiasGeluArguments& arguments, const Place& place);

}  // namespace encoder_fast
