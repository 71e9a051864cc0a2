// LayerNorm of a sum on the CPU: normalise(x + x_bias + residual) * weight + bias, row by row, with
// float32 statistics in two passes.

#pragma once

#include <cstdint>

#include "dtype.h"

namespace encoder_fast::cpu {

struct AddLayerNormArguments {
    const void* x;         // (rows, width), contiguous, as all that follows
    const void* residual;  // or null
    const void* x_bias;    // (width,) or null
    const void* weight;    // (width,) or null
    const void* bias;      // (width,) or null
    void* out;
    void* sum;             // what is normalised, or null
    int64_t rows;
    int width;             // a multiple of 16, at most kMostWidth
    float eps;
    DType dtype;           // of all
};

constexpr int kMostWidth = 8192;

void add_layer_norm(const AddLayerNormArguments& arguments, int isa, int threads);

}  // namespace encoder_fast::cpu
