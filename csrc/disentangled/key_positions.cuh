// The term q_i · pos_key[row(i - j)] of a warp's 32 rows of queries.
//
// Products come by query and distance. A unit is 16 queries by 8 distances, one part of an
// accumulator: column c of unit v is the distance 8 v + 7 - c above the first of the warp's, so
// that keys run with the columns. In the scores, query row y has it (y + 1) mod 8 columns further,
// in this unit's place or in the next: a shift along the row. It is the same for the two rows of a
// lane, which are 8 apart, so they travel as a pair in half precision, as the original has them.
//
//     row y:   column c  ->  (c + y + 1) mod 8
//
// The next tile of keys needs the units of this one and four more. They are kept in registers.

#pragma once

#include "attention/fragments.cuh"
#include "disentangled/traits.cuh"
#include "ptx.cuh"

namespace encoder_fast {

template <class Traits>
struct KeyPositions {
    using Element = typename Traits::Element;
    static constexpr int kHeadDim = Traits::kHeadDim;
    static constexpr int kRowTiles = Traits::kRowTiles;
    static constexpr int kNewUnits = kPositionBlock / 8;
    // The first 16 rows are nearest to the keys, and go back furthest.
    static constexpr EF_DEVICE int kept_units(int r) { return 2 * (kRowTiles - r); }

    // Of a lane's rows, the upper one in unit v and the lower one in unit v + 1. Of the two
    // columns, the one that goes to an even column is the first.
    uint32_t pairs[kRowTiles][2 * kRowTiles + kNewUnits - 1][2] = {};
    // The upper row in the last unit, both columns.
    uint32_t last[kRowTiles] = {};

    // An odd shift takes the second column of two to an even one.
    static EF_DEVICE bool swaps_columns(int lane) { return lane / 4 % 2 == 0; }

    // Takes in the distances of one slot of the ring, whose rows begin at `rows`.
    EF_DEVICE void advance(const QueryFragments<kHeadDim> (&q)[kRowTiles], SharedAddress rows,
                           int lane) {
        AccumulatorTile units[kRowTiles][kNewUnits] = {};
        // Within 8 rows, lane ^ 7 reads from the last to the first.
        const BlockReader<kHeadDim, MatrixOrder::kRightThenDown> block(rows, lane ^ 7);
#pragma unroll
        for (int n = 0; n < kNewUnits / 2; n++) {
#pragma unroll
            for (int d = 0; d < kHeadDim / kFragment; d++) {
                uint32_t b[4];
                ldmatrix_x4(b, block(n, d));
#pragma unroll
                for (int r = 0; r < kRowTiles; r++) {
                    mma_m16n8k16<Element>(units[r][2 * n], q[r][d], {b[0], b[1]});
                    mma_m16n8k16<Element>(units[r][2 * n + 1], q[r][d], {b[2], b[3]});
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kRowTiles; r++) take_in(units[r], r, swaps_columns(lane));
    }

    // The term for the tile of keys that is due.
    EF_DEVICE void score(Accumulator<Traits::kKeys> (&scores)[kRowTiles], int lane) const {
        const int row = lane / 4, column = lane % 4 * 2;
        const bool swaps = swaps_columns(lane);
        int source[2];
        bool stays[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            source[i] = row * 4 + ((column + i - row - 1) & 7) / 2;
            stays[i] = column + (swaps ? 1 - i : i) + row + 1 >= 8;
        }
#pragma unroll
        for (int r = 0; r < kRowTiles; r++) {
#pragma unroll
            for (int n = 0; n < Traits::kKeys / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint32_t pair = stays[i] ? pairs[r][4 - n][i] : pairs[r][3 - n][i];
                    const float2 rows = unpack2<Element>(shuffle(pair, source[i]));
                    scores[r][n][i] = rows.x;
                    scores[r][n][i + 2] = rows.y;
                }
            }
        }
    }

  private:
    EF_DEVICE void take_in(const AccumulatorTile (&units)[kNewUnits], int r, bool swaps) {
        const int kept = kept_units(r);
#pragma unroll
        for (int v = 0; v < kept - 1; v++) {
#pragma unroll
            for (int i = 0; i < 2; i++) pairs[r][v][i] = pairs[r][v + kNewUnits][i];
        }
        const uint32_t first = pack2<Element>(units[0][2], units[0][3]);
#pragma unroll
        for (int v = 0; v < kNewUnits; v++) {
            uint32_t columns[2];
            if (v == 0) {
                columns[0] = (last[r] & 0xffff) | first << 16;
                columns[1] = last[r] >> 16 | (first & 0xffff0000);
            } else {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    columns[i] = pack2<Element>(units[v - 1][i], units[v][i + 2]);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                pairs[r][kept - 1 + v][i] = swaps ? columns[1 - i] : columns[i];
            }
        }
        last[r] = pack2<Element>(units[kNewUnits - 1][0], units[kNewUnits - 1][1]);
    }
};

}  // namespace encoder_fast
