// Rows of any element type, read and written kVector elements at a time.

#pragma once

#include "dtype.h"
#include "operands.h"
#include "ptx.cuh"

namespace encoder_fast {

constexpr int kAccessBytes = 16;

// Elements of one full access.
template <class T>
constexpr int kFullVector = kAccessBytes / static_cast<int>(sizeof(T));

namespace detail {

template <int kBytes>
struct RawOf;
template <>
struct RawOf<16> {
    using Type = uint4;
};
template <>
struct RawOf<8> {
    using Type = uint2;
};
template <>
struct RawOf<4> {
    using Type = uint32_t;
};
template <>
struct RawOf<2> {
    using Type = uint16_t;
};

}  // namespace detail

// The registers of kVector elements as they lie in memory.
template <class T, int kVector>
using Raw = typename detail::RawOf<kVector * static_cast<int>(sizeof(T))>::Type;

template <class T, int kVector>
EF_DEVICE void unpack(const Raw<T, kVector>& raw, float (&values)[kVector]) {
    if constexpr (sizeof(T) == 2 && kVector == 1) {
        values[0] = to_float(T{raw});
    } else {
        const uint32_t* word = reinterpret_cast<const uint32_t*>(&raw);
#pragma unroll
        for (int i = 0; i < kVector * static_cast<int>(sizeof(T)) / 4; i++) {
            if constexpr (sizeof(T) == 4) {
                values[i] = bits_to_float(word[i]);
            } else {
                const float2 pair = unpack2<T>(word[i]);
                values[2 * i] = pair.x;
                values[2 * i + 1] = pair.y;
            }
        }
    }
}

// One rounding, to nearest.
template <class T, int kVector>
EF_DEVICE Raw<T, kVector> pack(const float (&values)[kVector]) {
    if constexpr (sizeof(T) == 2 && kVector == 1) {
        return from_float<T>(values[0]).bits;
    } else {
        Raw<T, kVector> raw;
        uint32_t* word = reinterpret_cast<uint32_t*>(&raw);
#pragma unroll
        for (int i = 0; i < kVector * static_cast<int>(sizeof(T)) / 4; i++) {
            if constexpr (sizeof(T) == 4) {
                word[i] = float_to_bits(values[i]);
            } else {
                word[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
            }
        }
        return raw;
    }
}

template <class T, int kVector>
EF_DEVICE Raw<T, kVector> load_raw(const void* row, int column) {
    const T* elements = static_cast<const T*>(row) + column;
    return load_global(reinterpret_cast<const Raw<T, kVector>*>(elements));
}

template <class T, int kVector>
EF_DEVICE void store_packed(void* row, int column, const float (&values)[kVector]) {
    T* elements = static_cast<T*>(row) + column;
    store_global(reinterpret_cast<Raw<T, kVector>*>(elements), pack<T, kVector>(values));
}

// In accesses of 16 bytes at most: eight float32 are two of them.
template <class T, int kVector>
EF_DEVICE void load_elements(const void* data, int column, float (&values)[kVector]) {
    constexpr int kOnce = kVector < kFullVector<T> ? kVector : kFullVector<T>;
#pragma unroll
    for (int i = 0; i < kVector; i += kOnce) {
        float part[kOnce];
        unpack<T, kOnce>(load_raw<T, kOnce>(data, column + i), part);
#pragma unroll
        for (int j = 0; j < kOnce; j++) values[i + j] = part[j];
    }
}

// Elements `column` and on of a vector, whatever its type: the branch is the same for all threads.
template <int kVector>
EF_DEVICE void load_vector(const Vector& vector, int column, float (&values)[kVector]) {
    if (vector.dtype == DType::kFloat32) {
        load_elements<float, kVector>(vector.data, column, values);
    } else if (vector.dtype == DType::kFloat16) {
        load_elements<Half, kVector>(vector.data, column, values);
    } else {
        load_elements<BFloat16, kVector>(vector.data, column, values);
    }
}

// Whether every access of kAccessBytes that starts in `data` plus a multiple of the strides and of
// a full vector is aligned. Absent operands are.
inline bool is_aligned(const void* data) {
    return reinterpret_cast<uintptr_t>(data) % kAccessBytes == 0;
}

template <class T>
bool is_aligned(const Rows& rows) {
    return is_aligned(rows.data) && (rows.data == nullptr || rows.stride % kFullVector<T> == 0);
}

}  // namespace encoder_fast
