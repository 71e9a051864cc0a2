// What a kernel of attention is given: the call, and how it was cut.

#pragma once

#include <string>

#include "attention.h"
#include "ptx.cuh"

namespace encoder_fast {

struct AttentionLaunch : AttentionArguments {
    float scale_log2;        // softmax_scale log2(e)
    int tile_rows;           // query rows of a tile
    int tiles_per_sequence;  // of the regular grid
    bool listed;             // take tiles from the list instead
};

// For messages.
inline std::string describe(const AttentionArguments& a) {
    return "attention of " + std::to_string(a.total) + " tokens in " + std::to_string(a.batch) +
           " sequences of at most " + std::to_string(a.max_seqlen) + ", " +
           std::to_string(a.heads) + " heads of " + std::to_string(a.head_dim);
}

// One head, from a row on. Offsets need 64 bits: a row may lie beyond 2^31 elements.
template <class Element>
EF_DEVICE const Element* rows_from(const Heads& x, int row, int head) {
    return static_cast<const Element*>(x.data) + row * x.row_stride + head * x.head_stride;
}

template <class Element>
EF_DEVICE Element* out_rows_from(const AttentionLaunch& p, int row, int head) {
    const int64_t head_row = static_cast<int64_t>(row) * p.heads + head;
    return static_cast<Element*>(p.out) + head_row * p.head_dim;
}

// Tokens behind the last sequence belong to nobody: the blocks share them out and clear them, most
// often none.
EF_DEVICE void clear_tail(const AttentionLaunch& p) {
    constexpr int kElements = sizeof(uint4) / 2;
    const int end = load_global(p.cu_seqlens + p.batch);
    if (end >= p.total) return;
    const int first = end > 0 ? end : 0;
    const int64_t row_stores = static_cast<int64_t>(p.heads) * p.head_dim / kElements;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    uint4* const out = static_cast<uint4*>(p.out);
    for (int64_t i = first * row_stores + thread; i < p.total * row_stores; i += threads) {
        store_global(out + i, uint4{0, 0, 0, 0});
    }
}

}  // namespace encoder_fast
