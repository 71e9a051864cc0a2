// What a kernel of disentangled attention is given.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "attention/launch_params.cuh"
#include "disentangled_attention.h"

namespace encoder_fast {

// Rows that the loop copies from. Strides of 32 bits take one instruction in an address.
struct StridedRows {
    const char* data;
    int row_bytes, head_bytes;
};

struct DisentangledLaunch : AttentionLaunch {
    StridedRows keys, values, key_positions, query_positions;
    const int32_t* row_of_distance;
    int reach;
};

inline int bytes_of_stride(const char* what, int64_t elements, int64_t limit) {
    if (elements < 0 || elements >= limit) {
        throw std::invalid_argument("the " + std::string(what) + " of k, v, pos_key and pos_query " +
                                    "must be from 0 to below " + std::to_string(limit) +
                                    " elements, got " + std::to_string(elements));
    }
    return static_cast<int>(2 * elements);
}

// The copies of a tile add up to 32 rows to a pointer in 32 bits.
inline StridedRows strided_rows(const Heads& x) {
    return {static_cast<const char*>(x.data),
            bytes_of_stride("row stride", x.row_stride, int64_t{1} << 25),
            bytes_of_stride("head stride", x.head_stride, int64_t{1} << 30)};
}

EF_DEVICE const char* row_from(const StridedRows& x, int row, int head) {
    return x.data + static_cast<int64_t>(row) * x.row_bytes +
           static_cast<int64_t>(head) * x.head_bytes;
}

}  // namespace encoder_fast
