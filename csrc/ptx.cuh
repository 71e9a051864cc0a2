// What CUDA C++ has no word for: each function here is one PTX instruction, or a few.
//
// No other file holds inline PTX, which is why this one is long. Each function has two bodies: PTX
// for the device, and with ENCODER_FAST_HOST a call of the emulation in tests/cuda_host/emulation.h,
// so that g++ can compile the same kernels for a CPU. To keep a kernel compilable there:
//
// - Shared memory is dynamic and addressed in bytes: `shared_memory()` is the first address, and
//   `load_shared<uint4>(address)`, `store_shared(address, value)`, `ldmatrix_x4`, `cp_async` take
//   such addresses. There is no __shared__ variable and no generic pointer into shared memory.
//   Accesses are of 4, 8 or 16 bytes.
// - Global memory is read by `load_global(pointer)` and `cp_async`, written by `store_global`. The
//   emulation knows the extent of each operand and checks every access, against other blocks' too.
// - Kernels take one plain struct and are started by `launch` (launch.cuh), not by <<<...>>>.
// - Barriers, shuffles, votes and atomics are the functions below; threadIdx, blockIdx, blockDim
//   and gridDim are as in CUDA.
//
// A function here needs a case in tests/cuda_host/wrappers.cu, which holds the PTX of its device body
// against its host body.
//
// Numbers in half precision are `Half` and `BFloat16`, which are bits and nothing else; arithmetic
// is done in float.

#pragma once

#include <cstddef>
#include <cstdint>

#ifdef ENCODER_FAST_HOST
#include "emulation.h"
#define EF_DEVICE inline
#else
#include <cuda_runtime.h>
#define EF_DEVICE __device__ __forceinline__
#endif

namespace encoder_fast {

struct Half {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

EF_DEVICE float to_float(float x) { return x; }

EF_DEVICE float to_float(Half x) {
#ifdef ENCODER_FAST_HOST
    return emulation::half_to_float(x.bits);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#endif
}

EF_DEVICE float to_float(BFloat16 x) {
#ifdef ENCODER_FAST_HOST
    return emulation::bfloat16_to_float(x.bits);
#else
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
#endif
}

EF_DEVICE float bits_to_float(uint32_t bits) {
#ifdef ENCODER_FAST_HOST
    return emulation::reinterpret<float>(bits);
#else
    return __uint_as_float(bits);
#endif
}

EF_DEVICE uint32_t float_to_bits(float x) {
#ifdef ENCODER_FAST_HOST
    return emulation::reinterpret<uint32_t>(x);
#else
    return __float_as_uint(x);
#endif
}

// Two neighbours of a row, as one register holds them: the first in the low half.
template <class T>
EF_DEVICE float2 unpack2(uint32_t pair) {
    const T low{static_cast<uint16_t>(pair)}, high{static_cast<uint16_t>(pair >> 16)};
    return float2{to_float(low), to_float(high)};
}

// Rounds to nearest even.
template <class T>
EF_DEVICE uint32_t pack2(float low, float high);

template <>
EF_DEVICE uint32_t pack2<Half>(float low, float high) {
#ifdef ENCODER_FAST_HOST
    return emulation::float_to_half(low) | emulation::float_to_half(high) << 16;
#else
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}

template <>
EF_DEVICE uint32_t pack2<BFloat16>(float low, float high) {
#ifdef ENCODER_FAST_HOST
    return emulation::float_to_bfloat16(low) | emulation::float_to_bfloat16(high) << 16;
#else
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}

template <class T>
EF_DEVICE T from_float(float x) {
    return T{static_cast<uint16_t>(pack2<T>(x, 0.0f))};
}

template <>
EF_DEVICE float from_float<float>(float x) {
    return x;
}

// To 2 units in the last place.
EF_DEVICE float reciprocal_sqrt(float x) {
#ifdef ENCODER_FAST_HOST
    return 1.0f / std::sqrt(x);
#else
    return rsqrtf(x);
#endif
}

// 2^x to 2 units in the last place; results below the smallest normal float are 0.
EF_DEVICE float exp2_approx(float x) {
#ifdef ENCODER_FAST_HOST
    return emulation::exp2_flushed(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// To 1 unit in the last place; arguments and results below the smallest normal float are 0.
EF_DEVICE float reciprocal_approx(float x) {
#ifdef ENCODER_FAST_HOST
    return emulation::flushed(1.0f / emulation::flushed(x));
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

EF_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }
EF_DEVICE int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// The same number, of which the compiler no longer knows more than that it is not negative: what a
// loop computes from it is computed there each time, instead of taking up registers around the loop.
EF_DEVICE int opaque(int x) {
#ifndef ENCODER_FAST_HOST
    asm volatile("" : "+r"(x));
    __builtin_assume(x >= 0);
#endif
    return x;
}

// A barrier for all threads of the block; shared memory written before it is seen after it.
EF_DEVICE void sync_threads() {
#ifdef ENCODER_FAST_HOST
    emulation::barrier(0, emulation::threads_of_block(), true);
#else
    __syncthreads();
#endif
}

// The same for the lanes of a warp.
EF_DEVICE void sync_warp(uint32_t lanes = kFullWarp) {
#ifdef ENCODER_FAST_HOST
    emulation::sync_warp(lanes);
#else
    __syncwarp(lanes);
#endif
}

// A barrier for `threads` threads, whole warps, that meet by number; 0 is sync_threads' own.
EF_DEVICE void named_barrier_sync(int barrier, int threads) {
#ifdef ENCODER_FAST_HOST
    emulation::barrier(barrier, threads, true);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#endif
}

// Counts towards the barrier without waiting for it.
EF_DEVICE void named_barrier_arrive(int barrier, int threads) {
#ifdef ENCODER_FAST_HOST
    emulation::barrier(barrier, threads, false);
#else
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#endif
}

// Orders this thread's writes before its later ones, for the rest of the device.
EF_DEVICE void fence_device() {
#ifndef ENCODER_FAST_HOST
    __threadfence();
#endif
}

template <class T>
EF_DEVICE T shuffle(T value, int source_lane, uint32_t lanes = kFullWarp) {
#ifdef ENCODER_FAST_HOST
    return emulation::shuffle(value, source_lane, lanes);
#else
    return __shfl_sync(lanes, value, source_lane);
#endif
}

template <class T>
EF_DEVICE T shuffle_xor(T value, int lane_mask, uint32_t lanes = kFullWarp) {
#ifdef ENCODER_FAST_HOST
    return emulation::shuffle(value, lane_id() ^ lane_mask, lanes);
#else
    return __shfl_xor_sync(lanes, value, lane_mask);
#endif
}

// From the lane `distance` below; the first lanes keep their own.
template <class T>
EF_DEVICE T shuffle_up(T value, int distance, uint32_t lanes = kFullWarp) {
#ifdef ENCODER_FAST_HOST
    const int source = lane_id() - distance;
    return emulation::shuffle(value, source < 0 ? lane_id() : source, lanes);
#else
    return __shfl_up_sync(lanes, value, distance);
#endif
}

// From the lane `distance` above; the last lanes keep their own.
template <class T>
EF_DEVICE T shuffle_down(T value, int distance, uint32_t lanes = kFullWarp) {
#ifdef ENCODER_FAST_HOST
    const int source = lane_id() + distance;
    return emulation::shuffle(value, source >= kWarpSize ? lane_id() : source, lanes);
#else
    return __shfl_down_sync(lanes, value, distance);
#endif
}

// One bit a lane.
EF_DEVICE uint32_t vote(bool predicate, uint32_t lanes = kFullWarp) {
#ifdef ENCODER_FAST_HOST
    return emulation::vote(predicate, lanes);
#else
    return __ballot_sync(lanes, predicate);
#endif
}

EF_DEVICE bool any_lane(bool predicate, uint32_t lanes = kFullWarp) {
    return vote(predicate, lanes) != 0;
}

EF_DEVICE bool all_lanes(bool predicate, uint32_t lanes = kFullWarp) {
    return vote(predicate, lanes) == lanes;
}

// One access of sizeof(T) bytes, aligned to them. For memory that no thread writes in this launch:
// it goes through the read-only path.
template <class T>
EF_DEVICE T load_global(const T* source) {
#ifdef ENCODER_FAST_HOST
    return emulation::load_global(source, emulation::GlobalAccess::kReadOnlyLoad);
#else
    return __ldg(source);
#endif
}

template <>
EF_DEVICE Half load_global(const Half* source) {
    return Half{load_global(reinterpret_cast<const uint16_t*>(source))};
}

template <>
EF_DEVICE BFloat16 load_global(const BFloat16* source) {
    return BFloat16{load_global(reinterpret_cast<const uint16_t*>(source))};
}

// The same for memory that this launch writes too.
template <class T>
EF_DEVICE T load_global_coherent(const T* source) {
#ifdef ENCODER_FAST_HOST
    return emulation::load_global(source, emulation::GlobalAccess::kLoad);
#else
    return *source;
#endif
}

template <class T>
EF_DEVICE void store_global(T* target, T value) {
#ifdef ENCODER_FAST_HOST
    emulation::store_global(target, value);
#else
    *target = value;
#endif
}

// Returns what was there before.
EF_DEVICE int atomic_add_global(int* target, int value) {
#ifdef ENCODER_FAST_HOST
    return emulation::atomic_add_global(target, value);
#else
    return atomicAdd(target, value);
#endif
}

using SharedAddress = uint32_t;

#ifndef ENCODER_FAST_HOST
extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
#endif

// The first byte of the block's dynamic shared memory, aligned to 1024.
EF_DEVICE SharedAddress shared_memory() {
#ifdef ENCODER_FAST_HOST
    return 0;
#else
    return static_cast<SharedAddress>(__cvta_generic_to_shared(dynamic_shared_memory));
#endif
}

template <class T>
EF_DEVICE T load_shared(SharedAddress source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
    T value;
#ifdef ENCODER_FAST_HOST
    emulation::load_shared(source, &value, sizeof(T));
#else
    uint32_t* word = reinterpret_cast<uint32_t*>(&value);
    if constexpr (sizeof(T) == 4) {
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word[0]) : "r"(source) : "memory");
    } else if constexpr (sizeof(T) == 8) {
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                     : "=r"(word[0]), "=r"(word[1])
                     : "r"(source)
                     : "memory");
    } else {
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                     : "r"(source)
                     : "memory");
    }
#endif
    return value;
}

template <class T>
EF_DEVICE void store_shared(SharedAddress target, T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
#ifdef ENCODER_FAST_HOST
    emulation::store_shared(target, &value, sizeof(T));
#else
    const uint32_t* word = reinterpret_cast<const uint32_t*>(&value);
    if constexpr (sizeof(T) == 4) {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(target), "r"(word[0]) : "memory");
    } else if constexpr (sizeof(T) == 8) {
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(target), "r"(word[0]), "r"(word[1])
                     : "memory");
    } else {
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(word[0]),
                     "r"(word[1]), "r"(word[2]), "r"(word[3])
                     : "memory");
    }
#endif
}

// Returns what was there before.
EF_DEVICE int atomic_add_shared(SharedAddress target, int value) {
#ifdef ENCODER_FAST_HOST
    return emulation::atomic_add_shared(target, value);
#else
    int before;
    asm volatile("atom.shared.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "r"(target), "r"(value)
                 : "memory");
    return before;
#endif
}

// Starts a copy of kBytes (4, 8 or 16) from global to shared memory; behind `source_bytes` of them
// it writes zeros and reads nothing. The data is there for this thread after cp_async_wait, for the
// others after a barrier behind it.
template <int kBytes>
EF_DEVICE void cp_async(SharedAddress target, const void* source, int source_bytes = kBytes) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "4, 8 or 16 bytes");
#ifdef ENCODER_FAST_HOST
    emulation::cp_async(target, source, kBytes, source_bytes);
#else
    // Only 16 bytes can pass by the L1 cache.
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                     "r"(source_bytes)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(source),
                     "n"(kBytes), "r"(source_bytes)
                     : "memory");
    }
#endif
}

// Makes a group of this thread's copies since the last group.
EF_DEVICE void cp_async_commit() {
#ifdef ENCODER_FAST_HOST
    emulation::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kGroups of this thread's groups, the newest ones, are under way.
template <int kGroups>
EF_DEVICE void cp_async_wait() {
#ifdef ENCODER_FAST_HOST
    emulation::cp_async_wait(kGroups);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// Loads 8 x 8 matrices of 16-bit elements. Lanes 8i to 8i + 7 give the addresses of the rows of
// matrix i, 16 aligned bytes each; fragment[i] of lane l is elements 2 (l % 4) and the next of row
// l / 4. With `trans`, of the transposed matrix.
EF_DEVICE void ldmatrix_x4(uint32_t (&fragment)[4], SharedAddress row) {
#ifdef ENCODER_FAST_HOST
    emulation::ldmatrix(fragment, 4, false, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row)
                 : "memory");
#endif
}

EF_DEVICE void ldmatrix_x4_trans(uint32_t (&fragment)[4], SharedAddress row) {
#ifdef ENCODER_FAST_HOST
    emulation::ldmatrix(fragment, 4, true, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row)
                 : "memory");
#endif
}

EF_DEVICE void ldmatrix_x2(uint32_t (&fragment)[2], SharedAddress row) {
#ifdef ENCODER_FAST_HOST
    emulation::ldmatrix(fragment, 2, false, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(row)
                 : "memory");
#endif
}

EF_DEVICE void ldmatrix_x2_trans(uint32_t (&fragment)[2], SharedAddress row) {
#ifdef ENCODER_FAST_HOST
    emulation::ldmatrix(fragment, 2, true, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(row)
                 : "memory");
#endif
}

EF_DEVICE void ldmatrix_x1(uint32_t (&fragment)[1], SharedAddress row) {
#ifdef ENCODER_FAST_HOST
    emulation::ldmatrix(fragment, 1, false, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0])
                 : "r"(row)
                 : "memory");
#endif
}

EF_DEVICE void ldmatrix_x1_trans(uint32_t (&fragment)[1], SharedAddress row) {
#ifdef ENCODER_FAST_HOST
    emulation::ldmatrix(fragment, 1, true, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0])
                 : "r"(row)
                 : "memory");
#endif
}

// d += a b for a 16 x 16 by row, b 16 x 8 by column, d 16 x 8 in float32. With g = lane / 4 and
// t = 2 (lane % 4): a[0], a[1] hold columns t, t + 1 of rows g and g + 8, a[2], a[3] the columns
// 8 further; b[0], b[1] rows t, t + 1 and t + 8, t + 9 of column g; d[0], d[1] columns t, t + 1 of
// row g, d[2], d[3] of row g + 8.
template <class T>
EF_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
EF_DEVICE void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef ENCODER_FAST_HOST
    emulation::mma_m16n8k16(d, a, b, emulation::half_to_float);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

template <>
EF_DEVICE void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
#ifdef ENCODER_FAST_HOST
    emulation::mma_m16n8k16(d, a, b, emulation::bfloat16_to_float);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace encoder_fast
