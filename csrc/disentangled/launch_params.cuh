// What a kernel of disentangled attention is given.

#pragma once

#include <cstdint>
#include <stdexcept>

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

inline int bytes_of_stride(int64_t elements) {
    const int64_t bytes = 2 * elements;
    if (bytes != static_cast<int32_t>(bytes)) {
        throw std::invalid_argument("strides must be below 2**30 elements, got " +
                                    std::to_string(elements));
    }
    return static_cast<int>(bytes);
}

inline StridedRows strided_rows(const Heads& x) {
    return {static_cast<const char*>(x.data), bytes_of_stride(x.row_stride),
            bytes_of_stride(x.head_stride)};
}

EF_DEVICE const char* row_from(const StridedRows& x, int row, int head) {
    return x.data + static_cast<int64_t>(row) * x.row_bytes +
           static_cast<int64_t>(head) * x.head_bytes;
}

}  // namespace encoder_fast
