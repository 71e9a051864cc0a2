// The kernel of add_layer_norm: some rows on one thread. A row stays in the first cache between
// its passes.

#pragma once

#include "cpu/add_layer_norm.h"
#include "cpu/element.h"

namespace encoder_fast::cpu {
namespace {

// Sums of so many elements are added up: over thousands, one running sum would lose digits.
constexpr int kBlock = 256;

template <class Io>
void add_layer_norm_rows(const AddLayerNormArguments& args, int64_t first, int64_t last) {
    using Storage = typename Io::Storage;
    const int width = args.width;
    const auto vector = [](const void* data) { return static_cast<const Storage*>(data); };
    const Storage *x_bias = vector(args.x_bias), *weight = vector(args.weight);
    const Storage* bias = vector(args.bias);
    alignas(64) float row[kMostWidth];
    for (int64_t i = first; i < last; ++i) {
        const Storage* x = vector(args.x) + i * width;
        const Storage* residual = args.residual ? vector(args.residual) + i * width : nullptr;
        Storage* sum = args.sum ? static_cast<Storage*>(args.sum) + i * width : nullptr;
        Storage* out = static_cast<Storage*>(args.out) + i * width;

        Vec total = zeros();
        for (int begin = 0; begin < width; begin += kBlock) {
            Vec part = zeros();
            for (int n = begin; n < width && n < begin + kBlock; n += kLanes) {
                Vec value = Io::load(x + n);
                if (x_bias) value = value + Io::load(x_bias + n);
                if (residual) value = value + Io::load(residual + n);
                if (sum) Io::store(sum + n, value);
                store(row + n, value);
                part = part + value;
            }
            total = total + part;
        }
        const Vec mean = fill(sum_of_lanes(total) / static_cast<float>(width));
        // The mean is rounded. What it leaves, the mean of the centred row, is taken off as well:
        // in a row of nearly equal elements it would be all that the division enlarges.
        Vec squares = zeros(), left = zeros();
        for (int begin = 0; begin < width; begin += kBlock) {
            Vec part = zeros(), part_left = zeros();
            for (int n = begin; n < width && n < begin + kBlock; n += kLanes) {
                const Vec centred = load(row + n) - mean;
                store(row + n, centred);
                part = fma(centred, centred, part);
                part_left = part_left + centred;
            }
            squares = squares + part;
            left = left + part_left;
        }
        const float rest = sum_of_lanes(left) / static_cast<float>(width);
        const float square = sum_of_lanes(squares) / static_cast<float>(width) - rest * rest;
        const float variance = square < 0 ? 0 : square;
        const Vec inverse = fill(1.0f / __builtin_sqrtf(variance + args.eps));
        for (int n = 0; n < width; n += kLanes) {
            Vec value = (load(row + n) - fill(rest)) * inverse;
            if (weight) value = value * Io::load(weight + n);
            if (bias) value = value + Io::load(bias + n);
            Io::store(out + n, value);
        }
    }
}

}  // namespace
}  // namespace encoder_fast::cpu
