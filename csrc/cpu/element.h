// The element types of operands: how a vector's worth of them is read and written.

#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace encoder_fast::cpu {
namespace {

struct Float32 {
    using Storage = float;
    static Vec load(const float* p) { return cpu::load(p); }
    static void store(float* p, Vec x) { cpu::store(p, x); }
};

struct Float16 {
    using Storage = uint16_t;
    static Vec load(const uint16_t* p) { return load_half(p); }
    static void store(uint16_t* p, Vec x) { store_half(p, x); }
};

struct BFloat16 {
    using Storage = uint16_t;
    static Vec load(const uint16_t* p) { return cpu::load(p); }
    static void store(uint16_t* p, Vec x) { cpu::store(p, x); }
};

}  // namespace
}  // namespace encoder_fast::cpu
