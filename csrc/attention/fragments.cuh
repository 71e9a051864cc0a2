// What a lane of a warp holds of the matrices of mma.m16n8k16, and where it reads them.

#pragma once

#include "attention/rows.cuh"
#include "ptx.cuh"

namespace encoder_fast {

// Rows, and columns but for those of an accumulator's part, of a matrix of mma and of the block
// that ldmatrix_x4 reads.
constexpr int kFragment = 16;

// Scores or outputs of 16 rows and kColumns columns as mma leaves them: lane l has columns
// 8 i + 2 (l % 4) and the next, [0] and [1] of row l / 4, [2] and [3] of row l / 4 + 8.
using AccumulatorTile = float[4];
template <int kColumns>
using Accumulator = AccumulatorTile[kColumns / 8];

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

    EF_DEVICE BlockReader(SharedAddress tile, int lane) {
        constexpr bool kDownFirst = kOrder == MatrixOrder::kDownThenRight;
        const int matrix = lane / 8;
        const int down = kDownFirst ? matrix % 2 : matrix / 2;
        right = kDownFirst ? matrix / 2 : matrix % 2;
        const int lane_row = lane % 8 + 8 * down;
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
EF_DEVICE void load_queries(QueryFragments<kHeadDim> (&q)[kRowTiles], SharedAddress rows,
                            int lane) {
    const BlockReader<kHeadDim, MatrixOrder::kDownThenRight> block(rows, lane);
#pragma unroll
    for (int r = 0; r < kRowTiles; r++) {
#pragma unroll
        for (int d = 0; d < kHeadDim / kFragment; d++) ldmatrix_x4(q[r][d], block(r, d));
    }
}

// Rounds 16 rows, each times its factor, and leaves them in shared memory.
template <class Element, int kHeadDim>
EF_DEVICE void put_rows(SharedAddress rows, const Accumulator<kHeadDim>& out,
                        const float (&factors)[2], int lane) {
    using Layout = RowLayout<kHeadDim>;
#pragma unroll
    for (int chunk = 0; chunk < Layout::kChunks; chunk++) {
        const SharedAddress first = rows + Layout::offset(lane / 4, chunk) + lane % 4 * 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float* pair = &out[chunk][2 * half];
            // 8 rows further on the chunks are permuted alike.
            store_shared(first + half * 8 * Layout::kRowBytes,
                         pack2<Element>(pair[0] * factors[half], pair[1] * factors[half]));
        }
    }
}

}  // namespace encoder_fast
