// Disentangled attention over tiles of keys, with a running softmax.
//
// As the loop of attention/key_loop.cuh, the last tile goes first, and alone is masked. What differs
// are the scores: both position terms are products on the matrix units, by distance where the
// scores are by key or by query. A warp moves them to their places by itself, in float32, so that
// the block meets once a tile, as without positions.

#pragma once

#include "attention/products.cuh"
#include "attention/softmax.cuh"
#include "attention/tile_list.cuh"
#include "disentangled/copies.cuh"
#include "disentangled/kept_work.cuh"
#include "disentangled/key_positions.cuh"
#include "disentangled/query_positions.cuh"

namespace encoder_fast {

// scores += q keysᵀ + the term of the queries' positions, for one tile of keys. `low` and `high`
// are the two blocks of distances.
template <class Traits>
EF_DEVICE void add_products(Accumulator<Traits::kKeys> (&scores)[Traits::kRowTiles],
                            const QueryFragments<Traits::kHeadDim> (&q)[Traits::kRowTiles],
                            SharedAddress keys, SharedAddress low, SharedAddress high, int lane) {
    constexpr int kHeadDim = Traits::kHeadDim, kPairs = Traits::kKeys / kFragment;
    using Element = typename Traits::Element;
    const BlockReader<kHeadDim, MatrixOrder::kRightThenDown> key_block(keys, lane);
    const BlockReader<kHeadDim, MatrixOrder::kDownThenRight> low_block(low, lane);
    const BlockReader<kHeadDim, MatrixOrder::kDownThenRight> high_block(high, lane);
    QueryPositions<Traits> positions(lane);
#pragma unroll
    for (int d = 0; d < kHeadDim / kFragment; d++) {
        uint32_t b[kPairs][4];
#pragma unroll
        for (int pair = 0; pair < kPairs; pair++) ldmatrix_x4(b[pair], key_block(pair, d));
        if constexpr (Traits::kHasQueryTable) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t a[4];
                ldmatrix_x4(a, low_block(i, d));
                positions.multiply(a, b, i - 2);
                ldmatrix_x4(a, high_block(i, d));
                positions.multiply(a, b, i);
            }
        }
#pragma unroll
        for (int r = 0; r < Traits::kRowTiles; r++) {
#pragma unroll
            for (int pair = 0; pair < kPairs; pair++) {
                AccumulatorTile* const part = &scores[r][2 * pair];
                mma_m16n8k16<Element>(part[0], q[r][d], {b[pair][0], b[pair][1]});
                mma_m16n8k16<Element>(part[1], q[r][d], {b[pair][2], b[pair][3]});
            }
        }
    }
    if constexpr (Traits::kHasQueryTable) positions.add_to(scores);
}

// From a warp's sums of weighted values to its rows of the output, through the queries' place.
template <class Traits>
EF_DEVICE void finish_warp(const DisentangledLaunch& p, const Work& work, SharedAddress queries,
                           const Accumulator<Traits::kHeadDim> (&out)[Traits::kRowTiles],
                           const RowSoftmax (&rows)[Traits::kRowTiles]) {
    using Element = typename Traits::Element;
    constexpr int kHeadDim = Traits::kHeadDim;
    const int thread = opaque(static_cast<int>(threadIdx.x)), lane = thread % kWarpSize;
    const int warp_row = thread / kWarpSize * Traits::kWarpRows;
    const int first_row = work.first_row + warp_row;
    const SharedAddress own = queries + warp_row * Traits::kRowBytes;
    // All queries were read before the loop's first barrier; the output takes their place.
#pragma unroll
    for (int r = 0; r < Traits::kRowTiles; r++) {
        float factors[2];
        rows[r].normalise(factors);
        put_rows<Element, kHeadDim>(own + r * kFragment * Traits::kRowBytes, out[r], factors, lane);
    }
    sync_warp();
    store_rows<kHeadDim, Traits::kWarpRows>(
        out_rows_from<Element>(p, work.begin + first_row, work.head), p.heads * kHeadDim, own,
        work.n_keys - first_row, lane);
}

template <class Traits, class Begun>
EF_DEVICE void attend_disentangled(const DisentangledLaunch& p, const Work& work,
                                   SharedAddress queries, Begun begun) {
    using Element = typename Traits::Element;
    constexpr int kHeadDim = Traits::kHeadDim, kKeys = Traits::kKeys;
    constexpr int kRowTiles = Traits::kRowTiles;
    const int n_rows = work.n_keys - work.first_row, row = work.begin + work.first_row;
    const int thread = opaque(static_cast<int>(threadIdx.x)), lane = thread % kWarpSize;
    const int warp = thread / kWarpSize, warp_row = warp * Traits::kWarpRows;
    const bool has_rows = warp_row < n_rows;
    const SharedAddress own = queries + warp_row * Traits::kRowBytes;
    const SharedAddress stages = queries + Traits::kQueryBytes;
    const SharedAddress ring = stages + Traits::kStages * Traits::kStageBytes;

    const KeptWork kept(ring + Traits::kTables * Traits::kRingBytes, work);
    const int last_tile = (work.n_keys - 1) / kKeys;
    copy_rows_async<kHeadDim, Traits::kRows, Traits::kThreads, false>(
        queries, rows_from<Element>(p.q, row, work.head), p.q.row_stride, n_rows, thread);
    const TileCopies<Traits> first_copies(p, work, thread);
    first_copies.template copy_keys<false>(stages + last_tile % 2 * Traits::kStageBytes,
                                           last_tile);
#pragma unroll 1
    for (int i = 0; i <= Traits::kWarps; i++) {
        first_copies.copy_positions(ring + i * Traits::kSlotBytes, last_tile + Traits::kWarps - i);
    }
    cp_async_commit();
    cp_async_wait<0>();
    sync_threads();
    begun();

    QueryFragments<kHeadDim> q[kRowTiles];
    RowSoftmax rows[kRowTiles];
    Accumulator<kHeadDim> out[kRowTiles] = {};
    KeyPositions<Traits> key_positions;
    if (has_rows) {
        load_queries<kHeadDim>(q, own, lane);
        if constexpr (Traits::kHasKeyTable) {
            key_positions.advance(q, ring + warp * Traits::kSlotBytes, lane);
        }
    }
    // The first warp's lower slot.
    int slot = 0;
#pragma unroll 1
    for (int tile = last_tile; tile >= 0; tile--) {
        // This tile has landed, and all warps are done with the one before, whose place is filled
        // next.
        cp_async_wait<0>();
        sync_threads();
        const SharedAddress keys = stages + tile % 2 * Traits::kStageBytes;
        if (tile > 0) {
            const Work same = kept.read();
            const TileCopies<Traits> copies(p, same, opaque(thread));
            copies.template copy_keys<true>(
                stages + (tile - 1) % 2 * Traits::kStageBytes, tile - 1);
            copies.copy_positions(
                ring + slot_behind<Traits>(slot, Traits::kWarps + 1), tile - 1);
        }
        cp_async_commit();

        if (has_rows) {
            const int same = opaque(thread), lane = same % kWarpSize;
            const int low_slot = slot_behind<Traits>(slot, same / kWarpSize);
            const int high_slot = slot_behind<Traits>(low_slot, 1);
            Accumulator<kKeys> scores[kRowTiles] = {};
            if constexpr (Traits::kHasKeyTable) {
                key_positions.advance(q, ring + high_slot, lane);
                key_positions.score(scores, lane);
            }
            const SharedAddress query_table = ring + Traits::kQueryTable;
            add_products<Traits>(scores, q, keys, query_table + low_slot, query_table + high_slot,
                                 lane);
            const int keys_there = kept.n_keys() - tile * kKeys;
            if (keys_there < kKeys) {
#pragma unroll
                for (int r = 0; r < kRowTiles; r++) mask_keys<kKeys>(scores[r], keys_there, lane);
            }
            update_maxima<kKeys, kHeadDim>(rows, out, scores, p.scale_log2);
            add_weighted_values<Element, kHeadDim, kKeys>(
                out, rows, scores, keys + Traits::kKeyBytes, p.scale_log2, lane);
        }
        slot = slot_behind<Traits>(slot, 1);
    }
    if (has_rows) finish_warp<Traits>(p, kept.read(), queries, out, rows);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kResidentBlocks)
disentangled_kernel(const __grid_constant__ DisentangledLaunch p) {
    clear_tail(p);
    for_each_item(p, count_items(p), shared_memory() + Traits::kSharedBytes - 16,
                  [&](const Work& work, auto begun) {
                      attend_disentangled<Traits>(p, work, shared_memory(), begun);
                  });
}

}  // namespace encoder_fast
