// The activation behind the first GEMM of a feed-forward block, in the erf form, which the epilogues
// of cuBLASLt don't have. In half precision it moves 4 bytes an element: memory bandwidth is the
// bound, with instruction issue close behind.
//
// A thread owns kVector columns of kRowsOfBlock rows: the bias is read once for all of them, and
// their loads go out together.

#include "bias_gelu.h"

#include "access.cuh"
#include "dispatch.cuh"
#include "launch.cuh"

namespace encoder_fast {
namespace {

constexpr int kRowsOfBlock = 4;
constexpr int kMostThreads = 256;

template <class T_, int kVector_>
struct GeluTraits {
    using T = T_;
    static constexpr int kVector = kVector_;
    static constexpr int kRegisters = 64;
    static constexpr int kBlocksPerMultiprocessor = 65536 / (kMostThreads * kRegisters);
};

struct BiasGeluParams {
    BiasGeluArguments a;
    int column_blocks;
};

// float32's own erf, to the last digits.
EF_DEVICE float gelu(float v, float) {
    constexpr float kSqrtHalf = 0.70710678118654752f;
    return 0.5f * v * (1.0f + erff(v * kSqrtHalf));
}

// For results of 11 bits: max(v, 0) - |v| / 2 * erfc(|v| / sqrt(2)), with erfc as a polynomial in
// 1 / (1 + p |v|) times exp(-v^2 / 2) (Abramowitz and Stegun 7.1.26). It is off by 3.3e-7 at most,
// and rounds to the nearest float16 more often than the formula above, which cancels where v is
// negative. Half as many instructions: with erff they took longer than memory.
template <class T>
EF_DEVICE float gelu(float v, T) {
    constexpr float kP = 0.23164189f;  // 0.3275911 / sqrt(2)
    constexpr float kExponent = -0.72134752f;  // -log2(e) / 2
    // Beyond it erfc is 0 in float32, and inf * 0 would be NaN.
    constexpr float kFar = 20.0f;
    const float a = fminf(fabsf(v), kFar);
    const float t = reciprocal_approx(fmaf(kP, a, 1.0f));
    float p = fmaf(1.061405429f, t, -1.453152027f);
    p = fmaf(p, t, 1.421413741f);
    p = fmaf(p, t, -0.284496736f);
    p = fmaf(p, t, 0.254829592f);
    const float half_erfc = 0.5f * t * p * exp2_approx(kExponent * a * a);
    // (v + |v|) / 2 and not max(v, 0): NaN stays NaN, and -inf becomes it, as in 0 * inf.
    return fmaf(-a, half_erfc, fmaf(0.5f, v, 0.5f * fabsf(v)));
}

template <class Traits>
__global__ void __launch_bounds__(kMostThreads, Traits::kBlocksPerMultiprocessor)
    bias_gelu_kernel(BiasGeluParams p) {
    using T = typename Traits::T;
    constexpr int kVector = Traits::kVector;
    const int column =
        static_cast<int>(blockIdx.x % p.column_blocks * blockDim.x + threadIdx.x) * kVector;
    if (column >= p.a.width) return;
    const int64_t first = int64_t{blockIdx.x / p.column_blocks} * kRowsOfBlock;

    const T* x = static_cast<const T*>(p.a.x.data) + column;
    Raw<T, kVector> raw[kRowsOfBlock];
#pragma unroll
    for (int i = 0; i < kRowsOfBlock; i++) {
        raw[i] = {};
        if (first + i >= p.a.rows) continue;
        // out may be x: each thread reads what it will write, and nobody else's.
        const T* elements = x + (first + i) * p.a.x.stride;
        raw[i] = load_global_coherent(reinterpret_cast<const Raw<T, kVector>*>(elements));
    }
    float bias[kVector] = {};
    if (p.a.bias.data != nullptr) load_vector<kVector>(p.a.bias, column, bias);
#pragma unroll
    for (int i = 0; i < kRowsOfBlock; i++) {
        if (first + i >= p.a.rows) break;
        float values[kVector];
        unpack<T, kVector>(raw[i], values);
#pragma unroll
        for (int j = 0; j < kVector; j++) values[j] = gelu(values[j] + bias[j], T{});
        store_packed<T, kVector>(static_cast<T*>(p.a.out) + (first + i) * p.a.width, column,
                                 values);
    }
}

template <class Traits>
void launch_bias_gelu(const BiasGeluArguments& a, const Place& place) {
    // As even as whole warps allow: 1,536 columns of half precision are 192 threads, not 256.
    const int vectors = (a.width + Traits::kVector - 1) / Traits::kVector;
    const int column_blocks = (vectors + kMostThreads - 1) / kMostThreads;
    const int threads = (vectors + column_blocks - 1) / column_blocks;
    const int64_t row_blocks = (a.rows + kRowsOfBlock - 1) / kRowsOfBlock;
    launch(bias_gelu_kernel<Traits>,
           LaunchShape{row_blocks * column_blocks, (threads + kWarpSize - 1) / kWarpSize * kWarpSize},
           BiasGeluParams{a, column_blocks}, static_cast<Stream>(place.stream),
           "bias_gelu of (" + std::to_string(a.rows) + ", " + std::to_string(a.width) + ")");
}

}  // namespace

void bias_gelu(const BiasGeluArguments& arguments, const Place& place) {
    if (arguments.rows == 0 || arguments.width == 0) return;
    const DeviceScope scope(place.device);
    with_type(arguments.dtype, [&](auto element) {
        using T = decltype(element);
        const BiasGeluArguments& a = arguments;
        if (a.width % kFullVector<T> == 0 && is_aligned<T>(a.x) && is_aligned(a.out) &&
            is_aligned(a.bias.data)) {
            launch_bias_gelu<GeluTraits<T, kFullVector<T>>>(a, place);
        } else {
            launch_bias_gelu<GeluTraits<T, 1>>(a, place);
        }
    });
}

}  // namespace encoder_fast
