// From a DType to a type: `with_type(dtype, [&](auto tag) { using T = decltype(tag); ... })`.

#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "dtype.h"
#include "ptx.cuh"

namespace encoder_fast {

// For Half and BFloat16 alone.
template <class Function>
void with_half_type(DType dtype, Function&& function) {
    switch (dtype) {
        case DType::kFloat16:
            return function(Half{});
        case DType::kBFloat16:
            return function(BFloat16{});
        default:
            throw std::invalid_argument("dtype must be float16 or bfloat16, got number " +
                                        std::to_string(static_cast<int>(dtype)));
    }
}

template <class Function>
void with_type(DType dtype, Function&& function) {
    if (dtype == DType::kFloat32) return function(float{});
    with_half_type(dtype, std::forward<Function>(function));
}

}  // namespace encoder_fast
