// out = LayerNorm(x + x_bias + residual) * weight + bias, a row at a time.

#pragma once

#include <cstdint>

#include "operands.h"

namespace encoder_fast {

struct AddLayerNormArguments {
    Rows x;
    Rows residual;  // may be absent
    Vector x_bias, weight, bias;
    void* out;  // (rows, width), contiguous
    void* sum;  // x + x_bias + residual, like out; null where it is not wanted
    int64_t rows;
    int width;
    float eps;
    DType dtype;  // of x, residual, out and sum
};

void add_layer_norm(const AddLayerNormArguments& arguments, const Place& place);

}  // namespace encoder_fast
