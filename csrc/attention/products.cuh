// The two matrix products of a warp: queries by keys, and weights by values.
//
// A warp has kRowTiles times 16 query rows. Every fragment of keys or values that it reads serves
// all of them.

#pragma once

#include "attention/fragments.cuh"
#include "attention/softmax.cuh"
#include "ptx.cuh"

namespace encoder_fast {

// scores = q keysᵀ for kKeys rows of keys.
template <class Element, int kHeadDim, int kKeys, int kRowTiles>
EF_DEVICE void multiply_by_keys(Accumulator<kKeys> (&scores)[kRowTiles],
                                const QueryFragments<kHeadDim> (&q)[kRowTiles],
                                SharedAddress keys, int lane) {
    // Rows of keys are columns of the product, so a matrix is taken as it lies, and the two that
    // make up b of one mma lie side by side.
    const BlockReader<kHeadDim, MatrixOrder::kRightThenDown> block(keys, lane);
#pragma unroll
    for (int r = 0; r < kRowTiles; r++) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) scores[r][n][i] = 0.0f;
        }
    }
#pragma unroll
    for (int d = 0; d < kHeadDim / kFragment; d++) {
#pragma unroll
        for (int n = 0; n < kKeys / kFragment; n++) {
            uint32_t b[4];
            ldmatrix_x4(b, block(n, d));
#pragma unroll
            for (int r = 0; r < kRowTiles; r++) {
                mma_m16n8k16<Element>(scores[r][2 * n], q[r][d], {b[0], b[1]});
                mma_m16n8k16<Element>(scores[r][2 * n + 1], q[r][d], {b[2], b[3]});
            }
        }
    }
}

// out += softmax weights of the scores, by values, for kKeys rows of values. The weights are made
// 16 keys at a time, so that the exponentials of some run beside the products of those before, and
// are rounded to Element.
template <class Element, int kHeadDim, int kKeys, int kRowTiles>
EF_DEVICE void add_weighted_values(Accumulator<kHeadDim> (&out)[kRowTiles],
                                   RowSoftmax (&rows)[kRowTiles],
                                   Accumulator<kKeys> (&scores)[kRowTiles], SharedAddress values,
                                   float scale_log2, int lane) {
    // Rows of values are the dimension that is summed over: each matrix is transposed.
    const BlockReader<kHeadDim, MatrixOrder::kDownThenRight> block(values, lane);
#pragma unroll
    for (int n = 0; n < kKeys / kFragment; n++) {
        // What a lane has of two score tiles is what it needs as a of the next product.
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int r = 0; r < kRowTiles; r++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                AccumulatorTile& tile = scores[r][2 * n + i];
                rows[r].weigh(tile, scale_log2);
                a[r][2 * i] = pack2<Element>(tile[0], tile[1]);
                a[r][2 * i + 1] = pack2<Element>(tile[2], tile[3]);
            }
        }
#pragma unroll
        for (int d = 0; d < kHeadDim / kFragment; d++) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, block(n, d));
#pragma unroll
            for (int r = 0; r < kRowTiles; r++) {
                mma_m16n8k16<Element>(out[r][2 * d], a[r], {b[0], b[1]});
                mma_m16n8k16<Element>(out[r][2 * d + 1], a[r], {b[2], b[3]});
            }
        }
    }
}

}  // namespace encoder_fast
