// A vector of floats as wide as the instruction set that the including file is compiled for, and
// what the kernels do with it.
//
// Everything here is in an anonymous namespace, and so are the kernels: the same functions are
// compiled for several instruction sets, and a linker that merged two of one name could put AVX-512
// where a processor has none. For the same reason no header of the standard C++ library is used.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace encoder_fast::cpu {
namespace {

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int kLanes = 16;

inline Vec zeros() { return _mm512_setzero_ps(); }
inline Vec fill(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
// The first `count` lanes; the rest are zeros, and not read.
inline Vec load_some(const void* p, int count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Where one of the two is not a number, the second.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline float sum_of_lanes(Vec x) { return _mm512_reduce_add_ps(x); }
inline float max_of_lanes(Vec x) { return _mm512_reduce_max_ps(x); }

// `x` in the lanes from `first` to before `last`, elsewhere `other`.
inline Vec keep(Vec x, int first, int last, Vec other) {
    const auto below = [](int lane) {
        return lane >= kLanes ? 0xffffu : lane <= 0 ? 0u : (1u << lane) - 1;
    };
    return _mm512_mask_mov_ps(other, static_cast<__mmask16>(below(last) & ~below(first)), x);
}

// x · 2^n for a whole n; 0 where that is too small for a float.
inline Vec scale_by_power(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
inline Vec nearest_integer(Vec x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline Vec load(const uint16_t* bf16) {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16));
    const __m512i wide = _mm512_cvtepu16_epi32(narrow);
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec load_half(const uint16_t* fp16) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(fp16)));
}
inline void store_half(uint16_t* fp16, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(fp16),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store(uint16_t* bf16, Vec x) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh(x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bf16),
                        reinterpret_cast<const __m256i&>(rounded));
#else
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bf16), _mm512_cvtepi32_epi16(rounded));
#endif
}

// Row i, lane j becomes row j, lane i: blocks of 8, 4, 2 and 1 lanes change places.
template <int kStep>
inline void swap_blocks(Vec (&rows)[kLanes]) {
    alignas(64) int low[kLanes], high[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        low[lane] = lane & kStep ? lane - kStep + kLanes : lane;
        high[lane] = lane & kStep ? lane + kLanes : lane + kStep;
    }
    const __m512i lows = _mm512_load_si512(low), highs = _mm512_load_si512(high);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        if (i & kStep) continue;
        const Vec a = rows[i], b = rows[i + kStep];
        rows[i] = _mm512_permutex2var_ps(a, lows, b);
        rows[i + kStep] = _mm512_permutex2var_ps(a, highs, b);
    }
}

inline void transpose(Vec (&rows)[kLanes]) {
    swap_blocks<8>(rows);
    swap_blocks<4>(rows);
    swap_blocks<2>(rows);
    swap_blocks<1>(rows);
}

#else

using Vec = __m256;
constexpr int kLanes = 8;

inline Vec zeros() { return _mm256_setzero_ps(); }
inline Vec fill(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline __m256i lanes_below(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline float sum_of_lanes(Vec x) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
inline float max_of_lanes(Vec x) {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}

inline Vec keep(Vec x, int first, int last, Vec other) {
    const __m256i kept = _mm256_andnot_si256(lanes_below(first), lanes_below(last));
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(kept));
}

inline Vec scale_by_power(Vec x, Vec n) {
    const Vec normal = _mm256_cmp_ps(n, fill(-126), _CMP_NLT_UQ);
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(x), power);
    return _mm256_and_ps(_mm256_castsi256_ps(scaled), normal);
}
inline Vec nearest_integer(Vec x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline Vec load(const uint16_t* bf16) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16));
    const __m256i wide = _mm256_cvtepu16_epi32(narrow);
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec load_half(const uint16_t* fp16) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(fp16)));
}
inline void store_half(uint16_t* fp16, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(fp16),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store(uint16_t* bf16, Vec x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const Vec nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0),
                                              _mm256_castps_si256(nan));
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(result),
                                            _mm256_extracti128_si256(result, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bf16), packed);
}

inline void transpose(Vec (&r)[kLanes]) {
    Vec pairs[8], quads[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
        quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
}

#endif

// 2^x for x <= 0; what is not a number stays so. The polynomial of degree 6 is within 3e-9 of 2^f
// for |f| <= 1/2, that of degree 4 within 4e-6, a five-hundredth of bfloat16's rounding step.
template <bool kExact>
inline Vec exp2_of_negative(Vec x) {
    x = max(fill(-200.0f), x);
    const Vec n = nearest_integer(x);
    const Vec f = x - n;
    Vec y;
    if constexpr (kExact) {
        y = fma(fill(1.5461444854736328e-4f), f, fill(1.3400427997112274e-3f));
        y = fma(y, f, fill(9.618056938052177e-3f));
        y = fma(y, f, fill(5.550327152013779e-2f));
        y = fma(y, f, fill(2.4022650718688965e-1f));
        y = fma(y, f, fill(6.931471824645996e-1f));
    } else {
        y = fma(fill(9.66636836528778e-3f), f, fill(5.5921975523233414e-2f));
        y = fma(y, f, fill(2.402234971523285e-1f));
        y = fma(y, f, fill(6.931210160255432e-1f));
    }
    return scale_by_power(fma(y, f, fill(1.0f)), n);
}

}  // namespace
}  // namespace encoder_fast::cpu
