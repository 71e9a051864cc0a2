// Softmax over scores in registers, as the weights of the second product and their sums.
//
// A weight is exp2(score * scale_log2 - m), one fused multiply-add and one exp2, with m the row's
// maximum times scale_log2. The rounding of m is one factor on a whole row, which the division at
// the end takes out again; so m is kept as it was subtracted, and scale_log2 must be positive.

#pragma once

#include <cfloat>
#include <cmath>

#include "attention/fragments.cuh"
#include "ptx.cuh"

namespace encoder_fast {

// The four lanes that share a row.
EF_DEVICE float row_maximum(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}

EF_DEVICE float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// Keys from n_keys on are not there: their weight is to be 0.
template <int kKeys>
EF_DEVICE void mask_keys(Accumulator<kKeys>& scores, int n_keys, int lane) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int key = 8 * n + lane % 4 * 2 + i % 2;
            scores[n][i] = key < n_keys ? scores[n][i] : -INFINITY;
        }
    }
}

// The two rows of a lane.
struct RowSoftmax {
    // Scaled. Finite from the start, so that a row whose scores so far are all -inf goes on as if
    // it had had no keys.
    float maxima[2] = {-FLT_MAX, -FLT_MAX};
    float sums[2] = {0.0f, 0.0f};  // of this lane's columns

    // Turns scores into weights.
    EF_DEVICE void weigh(AccumulatorTile& tile, float scale_log2) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            tile[i] = exp2_approx(fmaf(tile[i], scale_log2, -maxima[i / 2]));
            sums[i / 2] += tile[i];
        }
    }

    // By what the sums of weighted values are to be multiplied at the end.
    EF_DEVICE void normalise(float (&factors)[2]) const {
        factors[0] = reciprocal_approx(row_sum(sums[0]));
        factors[1] = reciprocal_approx(row_sum(sums[1]));
    }
};

// Raises this lane's maxima of its two rows, in units of the scores.
template <int kKeys>
EF_DEVICE void raise_maxima(float (&maxima)[2], const Accumulator<kKeys>& scores) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) maxima[i / 2] = fmaxf(maxima[i / 2], scores[n][i]);
    }
}

// Weights may grow to 2^8 before a new maximum is taken: far below what float16 holds, and as
// exact, while the rescaling is left out of most tiles.
constexpr float kRescaleAbove = 8.0f;

// Takes in the maxima of a further tile of scores, and rescales what was summed up where it must.
template <int kKeys, int kHeadDim, int kRowTiles>
EF_DEVICE void update_maxima(RowSoftmax (&rows)[kRowTiles],
                             Accumulator<kHeadDim> (&out)[kRowTiles],
                             const Accumulator<kKeys> (&scores)[kRowTiles], float scale_log2) {
    float maxima[kRowTiles][2];
    bool rescale = false;
#pragma unroll
    for (int r = 0; r < kRowTiles; r++) {
        maxima[r][0] = maxima[r][1] = -FLT_MAX;
        raise_maxima<kKeys>(maxima[r], scores[r]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float before = rows[r].maxima[half];
            maxima[r][half] = fmaxf(before, row_maximum(maxima[r][half]) * scale_log2);
            rescale = rescale || maxima[r][half] > before + kRescaleAbove;
        }
    }
    if (!any_lane(rescale)) return;
#pragma unroll
    for (int r = 0; r < kRowTiles; r++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float factor = exp2_approx(rows[r].maxima[half] - maxima[r][half]);
            rows[r].maxima[half] = maxima[r][half];
            rows[r].sums[half] *= factor;
#pragma unroll
            for (int d = 0; d < kHeadDim / 8; d++) {
                out[r][d][2 * half] *= factor;
                out[r][d][2 * half + 1] *= factor;
            }
        }
    }
}

}  // namespace encoder_fast
