// What the bindings say of an operand that is more than a pointer.

#pragma once

#include <cstdint>

#include "dtype.h"

namespace encoder_fast {

// A vector that may be of another type than the rows it is applied to, or absent.
struct Vector {
    const void* data = nullptr;
    DType dtype = DType::kFloat32;
};

// Rows whose elements lie side by side, `stride` elements apart. Absent without data.
struct Rows {
    const void* data = nullptr;
    int64_t stride = 0;
};

// Where a launch goes: the device, and the stream as CUDA's handle.
struct Place {
    int device = -1;
    void* stream = nullptr;
};

}  // namespace encoder_fast
