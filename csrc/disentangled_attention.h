// Disentangled attention (DeBERTa, arXiv 2006.03654) over packed tokens, within each sequence and
// head:
//
//     s[i, j] = q_i · k_j + q_i · pos_key[row(i - j)] + k_j · pos_query[row(i - j)]
//     out     = softmax(softmax_scale * s) v
//
// row(d) is row_of_distance[clamp(d, -reach, reach) + reach]. Rows behind the last sequence become
// zeros. Nothing waits for the device.

#pragma once

#include "attention.h"

namespace encoder_fast {

struct DisentangledArguments : AttentionArguments {
    Heads pos_key, pos_query;        // (rows, heads, head_dim); one may be absent
    const int32_t* row_of_distance;  // (2 reach + 1,)
    int reach;
};

// head_dim is 32 or 64; the workspace is that of attention.
void disentangled_attention(const DisentangledArguments& arguments, const Place& place);

}  // namespace encoder_fast
