// LayerNorm of rows that are held in registers: how a row is cut, and the arithmetic on it.
//
//     mean = sum(h) / N
//     rstd = 1 / sqrt(sum((h - mean)^2) / N + eps)
//     y    = (h - mean) * rstd * weight + bias
//
// kThreads threads share a row: a warp or half of one up to N = 1024, a block above. Access i of
// thread t is columns (i * kThreads + t) * kVector and on, so that neighbours in a warp read
// neighbours in memory.
//
// Statistics are float32. The mean is taken twice: what the first was rounded by would be divided by
// a deviation that may be far smaller, and a constant row could come out as 1 instead of 0. The
// second sum goes along with the sum of squares, so a row costs two reductions.

#pragma once

#include "access.cuh"
#include "dispatch.cuh"
#include "launch.cuh"

namespace encoder_fast {

template <class T_, int kVector_, int kThreads_, int kAccesses_>
struct RowTraits {
    using T = T_;
    static constexpr int kVector = kVector_;
    static constexpr int kThreads = kThreads_;
    static constexpr int kAccesses = kAccesses_;

    static constexpr int kElements = kVector * kAccesses;
    static constexpr int kMostColumns = kElements * kThreads;

    static constexpr int kBlockThreads = kThreads <= kWarpSize ? 128 : kThreads;
    static constexpr int kRows = kBlockThreads / kThreads;
    static constexpr int kWarpsOfRow = kThreads / kWarpSize;

    // Two reductions a row, of one and of two floats from each warp. Their slots are apart, so that
    // a barrier lies between any two uses of one.
    static constexpr size_t kSharedBytes = kWarpsOfRow > 1 ? 3 * kWarpsOfRow * sizeof(float) : 0;

    // The plan: a row as floats, the raw registers of two operands of the next row, addresses and
    // sums (an address for each access where they are single elements). Rounded up to what leaves a
    // whole number of blocks on a multiprocessor.
    static constexpr int kRawWords = kAccesses * ((kVector * static_cast<int>(sizeof(T)) + 3) / 4);
    static constexpr int kScratch = kVector == 1 ? 80 : kElements < 32 ? 36 : 48;
    static constexpr int kRegistersWanted = kElements + 2 * kRawWords + kScratch;
    static constexpr int kBlocksPerMultiprocessor = 65536 / (kBlockThreads * kRegistersWanted);
    static constexpr int kRegisters =
        65536 / (kBlockThreads * kBlocksPerMultiprocessor) / 8 * 8;

    static_assert(kVector == 1 || kVector == kFullVector<T>, "one element or 16 bytes an access");
    static_assert(kThreads == 16 || kThreads % kWarpSize == 0, "half a warp or whole warps");
    static_assert(kThreads <= kWarpSize || kRows == 1, "reductions are of a warp or of the block");
    static_assert(kThreads <= 512 && kWarpsOfRow <= kWarpSize, "partial sums fit one warp");
    static_assert(kBlocksPerMultiprocessor >= 1 && kRegisters <= 168, "room for the registers");
};

template <class... Traits>
struct Ladder {};

// Rungs in the order of their width; what serves N is the first that is wide enough.
template <class T>
struct RowLadders;

template <class T>
struct HalfRowLadders {
    using Aligned =
        Ladder<RowTraits<T, 8, 16, 1>, RowTraits<T, 8, 32, 1>, RowTraits<T, 8, 16, 3>,
               RowTraits<T, 8, 32, 2>, RowTraits<T, 8, 32, 3>, RowTraits<T, 8, 32, 4>,
               RowTraits<T, 8, 128, 2>, RowTraits<T, 8, 128, 4>, RowTraits<T, 8, 256, 4>>;
};

template <>
struct RowLadders<Half> : HalfRowLadders<Half> {};
template <>
struct RowLadders<BFloat16> : HalfRowLadders<BFloat16> {};
template <>
struct RowLadders<float> {
    using T = float;
    using Aligned = Ladder<RowTraits<T, 4, 32, 1>, RowTraits<T, 4, 32, 2>, RowTraits<T, 4, 32, 3>,
                           RowTraits<T, 4, 32, 4>, RowTraits<T, 4, 32, 6>, RowTraits<T, 4, 32, 8>,
                           RowTraits<T, 4, 128, 4>, RowTraits<T, 4, 256, 4>,
                           RowTraits<T, 4, 512, 4>>;
};

// For widths or strides that are no multiple of a full vector, and pointers that are not aligned.
template <class T>
using UnalignedLadder = Ladder<RowTraits<T, 1, 32, 4>, RowTraits<T, 1, 32, 16>,
                               RowTraits<T, 1, 64, 16>, RowTraits<T, 1, 256, 16>,
                               RowTraits<T, 1, 512, 16>>;

template <class Function, class... Traits>
void with_rung(Ladder<Traits...>, int width, Function&& function) {
    const auto serves = [&](auto traits) {
        if (width > decltype(traits)::kMostColumns) return false;
        function(traits);
        return true;
    };
    if (!(serves(Traits{}) || ...)) {
        throw std::invalid_argument("N must be at most 8192, got " + std::to_string(width));
    }
}

// Calls `function` with the traits for rows of `width` elements of T.
template <class T, class Function>
void with_row_traits(bool aligned, int width, Function&& function) {
    if (aligned && width % kFullVector<T> == 0) {
        with_rung(typename RowLadders<T>::Aligned{}, width, function);
    } else {
        with_rung(UnalignedLadder<T>{}, width, function);
    }
}

// A grid that fills the device once; its blocks walk over the rows.
template <class Traits>
LaunchShape row_launch(int64_t rows) {
    const int64_t needed = (rows + Traits::kRows - 1) / Traits::kRows;
    const int64_t resident =
        int64_t{multiprocessors()} * Traits::kBlocksPerMultiprocessor;
    return {needed < resident ? needed : resident, Traits::kBlockThreads, Traits::kSharedBytes};
}

template <class Traits>
EF_DEVICE int column_of(int access) {
    const int thread = static_cast<int>(threadIdx.x) % Traits::kThreads;
    return (access * Traits::kThreads + thread) * Traits::kVector;
}

template <class Traits>
using RawRow = Raw<typename Traits::T, Traits::kVector>[Traits::kAccesses];

// Starts the loads of a row; what lies beyond its columns, or of no row, is zero.
template <class Traits>
EF_DEVICE void load_row(RawRow<Traits>& raw, const void* row, int width) {
#pragma unroll
    for (int i = 0; i < Traits::kAccesses; i++) {
        const int column = column_of<Traits>(i);
        raw[i] = {};
        if (row != nullptr && column < width) {
            raw[i] = load_raw<typename Traits::T, Traits::kVector>(row, column);
        }
    }
}

template <class Traits>
EF_DEVICE void add_row(float (&row)[Traits::kElements], const RawRow<Traits>& raw) {
#pragma unroll
    for (int i = 0; i < Traits::kAccesses; i++) {
        float values[Traits::kVector];
        unpack<typename Traits::T, Traits::kVector>(raw[i], values);
#pragma unroll
        for (int j = 0; j < Traits::kVector; j++) row[i * Traits::kVector + j] += values[j];
    }
}

namespace detail {

template <class Traits, class T, class Function>
EF_DEVICE void with_elements_of(const void* data, int width, Function&& function) {
    float values[Traits::kAccesses][Traits::kVector] = {};
#pragma unroll
    for (int i = 0; i < Traits::kAccesses; i++) {
        const int column = column_of<Traits>(i);
        if (column < width) load_elements<T, Traits::kVector>(data, column, values[i]);
    }
#pragma unroll
    for (int i = 0; i < Traits::kElements; i++) {
        function(i, values[i / Traits::kVector][i % Traits::kVector]);
    }
}

}  // namespace detail

// Calls `function(i, value)` with what a vector has for element i of this thread, unless it is
// absent. The branch is outside the loop, so that the loads go out together.
template <class Traits, class Function>
EF_DEVICE void with_elements(const Vector& vector, int width, Function&& function) {
    if (vector.data == nullptr) return;
    if (vector.dtype == DType::kFloat32) {
        detail::with_elements_of<Traits, float>(vector.data, width, function);
    } else if (vector.dtype == DType::kFloat16) {
        detail::with_elements_of<Traits, Half>(vector.data, width, function);
    } else {
        detail::with_elements_of<Traits, BFloat16>(vector.data, width, function);
    }
}

// Sums over the threads of a row, the same in all of them. `slots` is that reduction's share of
// shared memory.
template <class Traits, int kSums>
EF_DEVICE void sum_over_row(float (&sums)[kSums], SharedAddress slots) {
    constexpr int kLanes = Traits::kThreads < kWarpSize ? Traits::kThreads : kWarpSize;
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma unroll
        for (int i = 0; i < kSums; i++) sums[i] += shuffle_xor(sums[i], step);
    }
    if constexpr (Traits::kWarpsOfRow > 1) {
#pragma unroll
        for (int i = 0; i < kSums; i++) {
            const SharedAddress slot = slots + 4 * i * Traits::kWarpsOfRow;
            if (lane_id() == 0) store_shared(slot + 4 * warp_id(), sums[i]);
        }
        sync_threads();
#pragma unroll
        for (int i = 0; i < kSums; i++) {
            const SharedAddress slot = slots + 4 * i * Traits::kWarpsOfRow;
            sums[i] = load_shared<float>(slot + 4 * (lane_id() % Traits::kWarpsOfRow));
        }
#pragma unroll
        for (int step = Traits::kWarpsOfRow / 2; step > 0; step /= 2) {
#pragma unroll
            for (int i = 0; i < kSums; i++) sums[i] += shuffle_xor(sums[i], step);
        }
    }
}

// Four sums side by side: shorter chains, of fewer roundings.
template <class Traits>
EF_DEVICE float sum_of(const float (&row)[Traits::kElements]) {
    static_assert(Traits::kElements % 4 == 0, "sums of four");
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < Traits::kElements; i++) sums[i % 4] += row[i];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// sum / width. The product with the reciprocal is corrected by what it misses: where all elements
// of a row are the same, an error of one unit would be scaled up to a result.
EF_DEVICE float divide(float sum, int width, float inverse_width) {
    const float quotient = sum * inverse_width;
    return fmaf(fmaf(-quotient, static_cast<float>(width), sum), inverse_width, quotient);
}

// y = row * scale + shift normalises it.
struct Affine {
    float scale, shift;
};

// Takes the mean out of a row, which must be zero beyond its columns and stays so, but for a rest
// that is in `shift`.
template <class Traits>
EF_DEVICE Affine centre(float (&row)[Traits::kElements], int width, float inverse_width,
                        float eps) {
    const SharedAddress slots = shared_memory();
    float sum[1] = {sum_of<Traits>(row)};
    sum_over_row<Traits>(sum, slots);
    const float mean = divide(sum[0], width, inverse_width);

    float sums[2] = {};
#pragma unroll
    for (int i = 0; i < Traits::kAccesses; i++) {
        const float subtrahend = column_of<Traits>(i) < width ? mean : 0.0f;
#pragma unroll
        for (int j = 0; j < Traits::kVector; j++) {
            float& value = row[i * Traits::kVector + j];
            value -= subtrahend;
            sums[1] = fmaf(value, value, sums[1]);
        }
    }
    sums[0] = sum_of<Traits>(row);
    sum_over_row<Traits>(sums, slots + 4 * Traits::kWarpsOfRow);
    const float rest = divide(sums[0], width, inverse_width);
    // The rest of the mean is far smaller than the deviation, or both are rounding errors, whose
    // difference may come out below zero. NaN must stay NaN.
    float variance = fmaf(-rest, rest, sums[1] * inverse_width);
    variance = variance < 0.0f ? 0.0f : variance;
    const float scale = reciprocal_sqrt(variance + eps);
    return {scale, -rest * scale};
}

template <class Traits>
EF_DEVICE void store_row(void* out, const float (&row)[Traits::kElements], int width) {
#pragma unroll
    for (int i = 0; i < Traits::kAccesses; i++) {
        const int column = column_of<Traits>(i);
        if (column >= width) continue;
        float values[Traits::kVector];
#pragma unroll
        for (int j = 0; j < Traits::kVector; j++) values[j] = row[i * Traits::kVector + j];
        store_packed<typename Traits::T, Traits::kVector>(out, column, values);
    }
}

}  // namespace encoder_fast
