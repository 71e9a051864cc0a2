// The CUDA execution model on a CPU, for tests: what csrc/ptx.cuh calls under ENCODER_FAST_HOST.
//
// The threads of a block are fibers that run until they have to wait; blocks run one after another.
// After `interleave(seed)` some blocks run side by side instead: they start in random order, any
// thread that is ready may run next, and a thread may be interrupted at each access to global memory
// and each atomic. What is read and written back without being one atomic comes apart.
//
// What goes wrong on a GPU in silence is an `Error` here, naming the kernel, block, thread and seed:
//
// - an access to global memory outside the operands that were allowed (`allow`), a store to one
//   that is only read, a misaligned access;
// - in global memory, bytes that one block writes and another writes or reads, but by atomics; that
//   two threads of a block do so with no barrier between; a load through the read-only path of what
//   the launch writes. Only interleaved is a write held against earlier reads too;
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

// How later launches run. A launch depends on the seed alone, not on the launches before it.
void interleave(uint64_t seed);
void run_in_order();

// Called with the kernel's name behind each launch that went well; null for nobody.
void observe_launches(std::function<void(const std::string&)> observer);

// From here on, kernels may access `rows` rows of `row_bytes`, `stride_bytes` apart.
void allow(uintptr_t pointer, size_t rows, size_t row_bytes, ptrdiff_t stride_bytes,
           bool writable);
void forbid_all();

enum class GlobalAccess { kLoad, kReadOnlyLoad, kStore, kAtomic };

void check_aligned(const void* pointer, size_t bytes);

// Checks one access of this thread. Others may run before it returns, none between that and what
// the caller does next.
void access_global(const void* pointer, size_t bytes, GlobalAccess access);

template <class T>
T load_global(const T* source, GlobalAccess access) {
    check_aligned(source, sizeof(T));
    access_global(source, sizeof(T), access);
    return *source;
}

template <class T>
void store_global(T* target, T value) {
    check_aligned(target, sizeof(T));
    access_global(target, sizeof(T), GlobalAccess::kStore);
    *target = value;
}

inline int atomic_add_global(int* target, int value) {
    check_aligned(target, sizeof(int));
    access_global(target, sizeof(int), GlobalAccess::kAtomic);
    const int before = *target;
    *target += value;
    return before;
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

// As .ftz does it: numbers too small to be normal are zeros.
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? 0.0f * x : x; }

// Like ex2.approx.ftz.
inline float exp2_flushed(float x) { return flushed(std::exp2(flushed(x))); }

}  // namespace emulation
