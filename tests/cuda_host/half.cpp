// Numbers in half precision, from and to float, rounded to the nearest and to even.

#include "emulation.h"

#include <vector>

namespace emulation {

float bfloat16_to_float(uint32_t bits) {
    bits <<= 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

uint32_t float_to_bfloat16(float x) {
    if (std::isnan(x)) return 0x7fff;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static float widen_half(uint32_t bits) {
    const float sign = bits & 0x8000 ? -1.0f : 1.0f;
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
    return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

float half_to_float(uint32_t bits) {
    // Looked up, for matrix products convert each of their elements.
    static const std::vector<float> table = [] {
        std::vector<float> all(1 << 16);
        for (uint32_t i = 0; i < all.size(); i++) all[i] = widen_half(i);
        return all;
    }();
    return table[bits];
}

uint32_t float_to_half(float x) {
    if (std::isnan(x)) return 0x7fff;
    const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
    x = std::fabs(x);
    if (x >= 65520.0f) return sign | 0x7c00;
    if (x < 0x1p-14f) return sign | static_cast<uint32_t>(std::nearbyint(x * 0x1p24f));
    const int exponent = std::ilogb(x);
    // A fraction that rounds up to 2048 carries into the exponent, as it should.
    const auto fraction = static_cast<uint32_t>(std::nearbyint(std::ldexp(x, 10 - exponent)));
    return sign | ((static_cast<uint32_t>(exponent + 14) << 10) + fraction);
}

}  // namespace emulation
