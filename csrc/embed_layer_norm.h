// out = LayerNorm(word[ids] + token_type[type ids] + position[position ids]) * weight + bias.

#pragma once

#include <cstdint>

#include "operands.h"

namespace encoder_fast {

// A table and the rows of it that the tokens want. Absent without data.
struct Lookup {
    Rows table;
    int64_t table_rows = 0;
    const void* ids = nullptr;
    bool ids_are_int64 = false;
};

struct EmbedLayerNormArguments {
    Lookup word;
    Lookup token_type, position;  // either may be absent
    Vector weight, bias;
    void* out;  // (tokens, width), contiguous
    int64_t tokens;
    int width;
    float eps;
    DType dtype;  // of the tables and out
};

void embed_layer_norm(const EmbedLayerNormArguments& arguments, const Place& place);

}  // namespace encoder_fast
