// The two matrix products of a warp: queries by keys, and weights by values.
//
// A warp has kRowTiles times 16 query rows. Every fragment of keys or values that it reads serves
// all of them.

#pragma once

#include "attention/rows.cuh"
#include "attention/traits.cuh"
#include "ptx.cuh"

namespace encoder_fast {

// Scores or outputs of 16 rows and kColumns columns as mma leaves them: lane l has columns
// 8 i + 2 (l % 4) and the next, [0] and [1] of row l / 4, [2] and [3] of row l / 4 + 8.
template <int kColumns>
using Accumulator = float[kColumns / 8][4];

template <int kHeadDim>
using QueryFragments = uint32_t[kHeadDim / kFragment][4];

// The four 8 x 8 matrices of a 16 x 16 block, in the order in which ldmatrix_x4 returns them.
enum class MatrixOrder { kDownThenRight, kRightThenDown };

// Where this lane reads the 16 x 16 blocks of a tile of rows.
template <int kHeadDim, MatrixOrder kOrder>
struct BlockReader {
    using Layout = RowLayout<kHeadDim>;
    SharedAddress row;
    int right, flip;

    EF_DEVICE explicit BlockReader(SharedAddress tile) {
        const int matrix = lane_id() / 8;
        const bool down_first = kOrder == MatrixOrder::kDownThenRight;
        const int down = down_first ? matrix % 2 : matrix / 2;
        right = down_first ? matrix / 2 : matrix % 2;
        const int lane_row = lane_id() % 8 + 8 * down;
        row = tile + lane_row * Layout::kRowBytes;
        flip = Layout::flip(lane_row);
    }

    EF_DEVICE SharedAddress operator()(int block_row, int block_column) const {
        return row + block_row * kFragment * Layout::kRowBytes +
               ((2 * block_column + right) ^ flip) * kChunkBytes;
    }
};

// kRowTiles times 16 rows of queries.
template <int kHeadDim, int kRowTiles>
EF_DEVICE void load_queries(QueryFragments<kHeadDim> (&q)[kRowTiles], SharedAddress rows) {
    const BlockReader<kHeadDim, MatrixOrder::kDownThenRight> block(rows);
#pragma unroll
    for (int r = 0; r < kRowTiles; r++) {
#pragma unroll
        for (int d = 0; d < kHeadDim / kFragment; d++) ldmatrix_x4(q[r][d], block(r, d));
    }
}

// scores = q keysᵀ for kKeys rows of keys.
template <class Element, int kHeadDim, int kKeys, int kRowTiles>
EF_DEVICE void multiply_by_keys(Accumulator<kKeys> (&scores)[kRowTiles],
                                const QueryFragments<kHeadDim> (&q)[kRowTiles],
                                SharedAddress keys) {
    // Rows of keys are columns of the product, so a matrix is taken as it lies, and the two that
    // make up b of one mma lie side by side.
    const BlockReader<kHeadDim, MatrixOrder::kRightThenDown> block(keys);
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

// out += weights values for kKeys rows of values. The weights are rounded to Element.
template <class Element, int kHeadDim, int kKeys, int kRowTiles>
EF_DEVICE void multiply_by_values(Accumulator<kHeadDim> (&out)[kRowTiles],
                                  const Accumulator<kKeys> (&weights)[kRowTiles],
                                  SharedAddress values) {
    // Rows of values are the dimension that is summed over: each matrix is transposed.
    const BlockReader<kHeadDim, MatrixOrder::kDownThenRight> block(values);
#pragma unroll
    for (int n = 0; n < kKeys / kFragment; n++) {
        // What a lane has of two score tiles is what it needs as a of the next product.
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int r = 0; r < kRowTiles; r++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = &weights[r][2 * n + i / 2][i % 2 * 2];
                a[r][i] = pack2<Element>(pair[0], pair[1]);
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

// Divides by the sums of the weights, rounds, and leaves 16 rows in shared memory.
template <class Element, int kHeadDim>
EF_DEVICE void put_rows(SharedAddress rows, const Accumulator<kHeadDim>& out,
                        const float (&sums)[2]) {
    using Layout = RowLayout<kHeadDim>;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = lane_id() / 4 + 8 * half;
        const float share = 1.0f / sums[half];
#pragma unroll
        for (int chunk = 0; chunk < Layout::kChunks; chunk++) {
            const float* pair = &out[chunk][2 * half];
            store_shared(rows + Layout::offset(row, chunk) + lane_id() % 4 * 4,
                         pack2<Element>(pair[0] * share, pair[1] * share));
        }
    }
}

}  // namespace encoder_fast
