// The step after each half of an encoder layer, bound by memory bandwidth: each element of x and
// residual is read once and each of out written once, 6 bytes an element in half precision, for
// about 12 floating point operations.
//
// Each row is loaded while the one before it is reduced. The vectors come out of the L1 cache for
// each row: held in registers they would cost a third of the warps, and with them more bytes in
// flight than their traffic costs.

#include "add_layer_norm.h"

#include "row_norm.cuh"

namespace encoder_fast {
namespace {

template <class T>
EF_DEVICE const void* row_of(const Rows& rows, int64_t row, int64_t n_rows) {
    if (rows.data == nullptr || row >= n_rows) return nullptr;
    return static_cast<const T*>(rows.data) + row * rows.stride;
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kBlockThreads, Traits::kBlocksPerMultiprocessor)
    add_layer_norm_kernel(AddLayerNormArguments p) {
    using T = typename Traits::T;
    const int64_t step = int64_t{gridDim.x} * Traits::kRows;
    const int row_in_block = static_cast<int>(threadIdx.x) / Traits::kThreads;
    const float inverse_width = 1.0f / static_cast<float>(p.width);
    int64_t row = int64_t{blockIdx.x} * Traits::kRows + row_in_block;

    RawRow<Traits> x, residual;
    load_row<Traits>(x, row_of<T>(p.x, row, p.rows), p.width);
    load_row<Traits>(residual, row_of<T>(p.residual, row, p.rows), p.width);
    // All threads of the block go on until its first row is beyond the last: they reduce together.
    for (; row - row_in_block < p.rows; row += step) {
        float values[Traits::kElements] = {};
        add_row<Traits>(values, x);
        with_elements<Traits>(p.x_bias, p.width, [&](int i, float b) { values[i] += b; });
        add_row<Traits>(values, residual);

        load_row<Traits>(x, row_of<T>(p.x, row + step, p.rows), p.width);
        load_row<Traits>(residual, row_of<T>(p.residual, row + step, p.rows), p.width);

        if (p.sum != nullptr && row < p.rows) {
            store_row<Traits>(static_cast<T*>(p.sum) + row * p.width, values, p.width);
        }
        const Affine y = centre<Traits>(values, p.width, inverse_width, p.eps);
#pragma unroll
        for (float& value : values) value = fmaf(value, y.scale, y.shift);
        with_elements<Traits>(p.weight, p.width, [&](int i, float w) { values[i] *= w; });
        with_elements<Traits>(p.bias, p.width, [&](int i, float b) { values[i] += b; });
        if (row < p.rows) {
            store_row<Traits>(static_cast<T*>(p.out) + row * p.width, values, p.width);
        }
    }
}

}  // namespace

void add_layer_norm(const AddLayerNormArguments& arguments, const Place& place) {
    if (arguments.rows == 0) return;
    const DeviceScope scope(place.device);
    with_type(arguments.dtype, [&](auto element) {
        using T = decltype(element);
        const AddLayerNormArguments& a = arguments;
        const bool aligned = is_aligned<T>(a.x) && is_aligned<T>(a.residual) && is_aligned(a.out) &&
                             is_aligned(a.sum) && is_aligned(a.x_bias.data) &&
                             is_aligned(a.weight.data) && is_aligned(a.bias.data);
        with_row_traits<T>(aligned, a.width, [&](auto traits) {
            using Traits = decltype(traits);
            launch(add_layer_norm_kernel<Traits>, row_launch<Traits>(a.rows), a,
                   static_cast<Stream>(place.stream),
                   "add_layer_norm of (" + std::to_string(a.rows) + ", " +
                       std::to_string(a.width) + ")");
        });
    });
}

}  // namespace encoder_fast
