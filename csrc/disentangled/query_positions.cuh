// The term k_j · pos_query[row(i - j)] of a warp's 32 rows of queries, and q_i · k_j with it.
//
// Products come by distance and key. A unit is 8 distances by 8 keys, half of an accumulator's
// part: row y of unit v is the distance 8 v + y above the ring's row 0 of the warp. In the scores,
// key column x has it (y + x) mod 8 rows further down, in this unit's place or in the next: a shift
// along the column, by one shuffle an element.

#pragma once

#include "attention/fragments.cuh"
#include "disentangled/traits.cuh"
#include "ptx.cuh"

namespace encoder_fast {

template <class Traits>
struct QueryPositions {
    static constexpr int kHeadDim = Traits::kHeadDim;
    static constexpr int kRowTiles = Traits::kRowTiles;
    static constexpr int kPairs = Traits::kKeys / kFragment;

    // 8 keys by 16 (kRowTiles + 1) distances. Each 16 keys further on are 16 distances further
    // down.
    AccumulatorTile products[2 * kPairs][kRowTiles + 1];
    int source[2];
    bool stays[2];

    EF_DEVICE explicit QueryPositions(int lane) : products{} {
        const int row = lane / 4, column = lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            source[i] = ((row - column - i) & 7) * 4 + lane % 4;
            stays[i] = row + column + i < 8;
        }
    }

    // Adds the products of 16 of the head's elements by 16 distances, the ones from row 16 a of
    // the warp on.
    EF_DEVICE void multiply(const uint32_t (&positions)[4], const uint32_t (&keys)[kPairs][4],
                            int a) {
#pragma unroll
        for (int pair = 0; pair < kPairs; pair++) {
            const int part = a + 1 + pair;
            if (part < 0 || part > kRowTiles) continue;
            using Element = typename Traits::Element;
            const uint32_t(&b)[4] = keys[pair];
            mma_m16n8k16<Element>(products[2 * pair][part], positions, {b[0], b[1]});
            mma_m16n8k16<Element>(products[2 * pair + 1][part], positions, {b[2], b[3]});
        }
    }

    EF_DEVICE void add_to(Accumulator<Traits::kKeys> (&scores)[kRowTiles]) const {
#pragma unroll
        for (int r = 0; r < kRowTiles; r++) {
#pragma unroll
            for (int n = 0; n < Traits::kKeys / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int unit = 2 * r + 2 - n % 2 + i / 2;
                    const float value = stays[i % 2] ? product(n, unit, i % 2)
                                                     : product(n, unit - 1, i % 2);
                    scores[r][n][i] += shuffle(value, source[i % 2]);
                }
            }
        }
    }

  private:
    EF_DEVICE float product(int n, int unit, int column) const {
        return products[n][unit / 2][2 * (unit % 2) + column];
    }
};

}  // namespace encoder_fast
