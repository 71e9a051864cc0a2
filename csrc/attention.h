// Variable-length bidirectional attention over packed tokens, within each sequence and head:
//
//     out = softmax(softmax_scale * q kᵀ) v
//
// Rows behind the last sequence become zeros. Nothing waits for the device.

#pragma once

#include <cstddef>
#include <cstdint>

#include "operands.h"

namespace encoder_fast {

// (total, heads, head_dim) with elements side by side; strides in elements. Rows and heads begin at
// multiples of 16 bytes.
struct Heads {
    const void* data = nullptr;
    int64_t row_stride = 0;
    int64_t head_stride = 0;
};

struct AttentionArguments {
    Heads q, k, v;
    void* out;                  // (total, heads, head_dim), contiguous
    const int32_t* cu_seqlens;  // (batch + 1,), from 0 on, not falling, at most total
    void* workspace;            // attention_workspace_bytes of it, aligned to 16
    int total;
    int batch;
    int heads;
    int head_dim;         // 32, 64 or 128
    int max_seqlen;       // no sequence is longer
    float softmax_scale;  // positive
    DType dtype;          // of q, k, v and out; 16 bits
};

size_t attention_workspace_bytes(int total, int batch, int max_seqlen);

void attention(const AttentionArguments& arguments, const Place& place);

}  // namespace encoder_fast
