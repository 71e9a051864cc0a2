// The CUDA execution model on a CPU, for tests: what csrc/ptx.cuh calls under ENCODER_FAST_HOST.
//
// The threads of a block are fibers that run until they have to wait; blocks run one after another.
// What goes wrong on a GPU in silence is an `Error` here, naming the kernel, block and thread:
//
// - an access to global memory outside the operands that were allowed (`allow`), a store to one
//   that is only read, a misaligned access;
// - an access to shared memory outside what the launch asked for; two threads of which one writes
//   and that no barrier orders; a read of what a cp.async has not been waited for;
// - a barrier or a warp operation that not all threads come to, or to which they come with
//   different operations or lanes.
//
// Shared memory starts as NaN. A cp.async lands when it is waited for, never earlier.
//
// To use: compile the kernels and this folder's .cpp files as C++17 with -DENCODER_FAST_HOST and the
// folder on the include path; `allow` each operand, `launch` (csrc/launch.cuh), `forbid_all`.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct float2 {
    float x, y;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

// Kernels run one at a time, so plain variables will do; the scheduler sets threadIdx.
inline uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Runs `thread` as every thread of a grid. Throws the first Error; what was written stays.
void run_grid(const std::string& kernel, unsigned blocks, unsigned threads, size_t shared_bytes,
              const std::function<void()>& thread);

// From here on, kernels may access `rows` rows of `row_bytes`, `stride_bytes` apart.
void allow(uintptr_t pointer, size_t rows, size_t row_bytes, ptrdiff_t stride_bytes,
           bool writable);
void forbid_all();

// Checks one access of this thread.
void check_global(const void* pointer, size_t bytes, bool write);

template <class T>
T load_global(const T* source) {
    check_global(source, sizeof(T), false);
    return *source;
}

template <class T>
void store_global(T* target, T value) {
    check_global(target, sizeof(T), true);
    *target = value;
}

void load_shared(uint32_t address, void* value, size_t bytes);
void store_shared(uint32_t address, const void* value, size_t bytes);
int atomic_add_shared(uint32_t address, int value);
void cp_async(uint32_t target, const void* source, size_t bytes, size_t source_bytes);
void cp_async_commit();
void cp_async_wait(size_t groups);

int threads_of_block();
void barrier(int number, int threads, bool wait);

// What each lane of a warp operation brings and takes away; `run` does it for all of them, with
// null for lanes that take no part. Every lane that `lanes` names must come.
using WarpOperation = void (*)(void* (&operands)[32]);
void warp_operation(const char* name, uint32_t lanes, void* operand, WarpOperation run);

void sync_warp(uint32_t lanes);
uint32_t vote(bool predicate, uint32_t lanes);
void ldmatrix(uint32_t* fragment, int matrices, bool transposed, uint32_t row);
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  float (*to_float)(uint32_t));

template <class T>
T shuffle(T value, int source_lane, uint32_t lanes) {
    struct Operand {
        T value, result;
        int source_lane;
    } mine{value, value, source_lane % 32};
    warp_operation("shuffle", lanes, &mine, [](void* (&operands)[32]) {
        for (void* operand : operands) {
            if (operand == nullptr) continue;
            Operand& lane = *static_cast<Operand*>(operand);
            const void* source = operands[lane.source_lane];
            if (source == nullptr) {
                throw Error("shuffle reads lane " + std::to_string(lane.source_lane) +
                            ", which takes no part");
            }
            lane.result = static_cast<const Operand*>(source)->value;
        }
    });
    return mine.result;
}

template <class To, class From>
To reinterpret(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

float half_to_float(uint32_t bits);
float bfloat16_to_float(uint32_t bits);
uint32_t float_to_half(float x);
uint32_t float_to_bfloat16(float x);

// Like ex2.approx.ftz: numbers too small to be normal are zeros.
inline float exp2_flushed(float x) {
    const float y = std::exp2(std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x);
    return std::fpclassify(y) == FP_SUBNORMAL ? 0.0f : y;
}

}  // namespace emulation
