// What the host hands over for one call of attention.

#pragma once

#include <cstdint>

namespace encoder_fast {

// q, k, v and out are (total, heads, head_dim) in one 16-bit type; out is contiguous, the others
// have a last stride of 1, and rows and heads that begin at multiples of 16 bytes.
struct AttentionParams {
    const void* q;
    const void* k;
    const void* v;
    void* out;
    const int32_t* cu_seqlens;  // (batch + 1,), on the device
    void* workspace;            // attention_workspace_bytes of it, aligned to 16; may be null for 0

    // In elements.
    int64_t q_row_stride, q_head_stride;
    int64_t k_row_stride, k_head_stride;
    int64_t v_row_stride, v_head_stride;

    int total;
    int batch;
    int heads;
    int head_dim;     // 32, 64 or 128
    int max_seqlen;   // no sequence is longer
    float softmax_scale;  // positive
    bool bfloat16;    // else float16
};

}  // namespace encoder_fast
