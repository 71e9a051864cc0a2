// Attention over tiles of keys, with a running softmax: sequences of any length.
//
// Only the last tile of keys can be partial. It goes first, so that it alone is masked. The tiles
// pass through kStages buffers: while one is multiplied, those behind it are on their way.

#pragma once

#include "attention/launch_params.cuh"
#include "attention/products.cuh"
#include "attention/rows.cuh"
#include "attention/softmax.cuh"
#include "attention/tile_list.cuh"
#include "attention/traits.cuh"
#include "ptx.cuh"

namespace encoder_fast {

// The keys and values of one head, tile by tile.
template <class Traits>
struct KeyTiles {
    using Element = typename Traits::Element;
    const Element* keys;
    const Element* values;
    int64_t key_stride, value_stride;
    SharedAddress stages;

    EF_DEVICE KeyTiles(const AttentionLaunch& p, const Work& work, SharedAddress stages)
        : keys(rows_from<Element>(p.k, work.begin, work.head)),
          values(rows_from<Element>(p.v, work.begin, work.head)),
          key_stride(p.k.row_stride),
          value_stride(p.v.row_stride),
          stages(stages) {}

    EF_DEVICE SharedAddress stage(int i) const { return stages + i * Traits::kStageBytes; }

    template <bool kWhole>
    EF_DEVICE void copy(int stage_index, int first_key, int n_keys, int thread) const {
        const SharedAddress target = stage(stage_index);
        copy_rows_async<Traits::kHeadDim, Traits::kKeys, Traits::kThreads, kWhole>(
            target, keys + first_key * key_stride, key_stride, n_keys, thread);
        copy_rows_async<Traits::kHeadDim, Traits::kKeys, Traits::kThreads, kWhole>(
            target + Traits::kKeyBytes, values + first_key * value_stride, value_stride, n_keys,
            thread);
    }
};

template <class Traits, class Begun>
EF_DEVICE void attend_key_loop(const AttentionLaunch& p, const Work& work, SharedAddress queries,
                               Begun begun) {
    using Element = typename Traits::Element;
    constexpr int kHeadDim = Traits::kHeadDim, kKeys = Traits::kKeys, kStages = Traits::kStages;
    constexpr int kRowTiles = Traits::kRowTiles;
    const int n_rows = work.n_keys - work.first_row, row = work.begin + work.first_row;
    const int thread = opaque(static_cast<int>(threadIdx.x)), lane = thread % kWarpSize;
    const int warp_row = thread / kWarpSize * Traits::kWarpRows;
    const bool has_rows = warp_row < n_rows;
    const SharedAddress own = queries + warp_row * Traits::kRowBytes;

    // The t-th tile to be multiplied is the last for t = 0, then t - 1.
    const int n_tiles = (work.n_keys + kKeys - 1) / kKeys;
    const int last_key = (n_tiles - 1) * kKeys;
    const KeyTiles<Traits> tiles(p, work, queries + Traits::kQueryBytes);
    copy_rows_async<kHeadDim, Traits::kRows, Traits::kThreads, false>(
        queries, rows_from<Element>(p.q, row, work.head), p.q.row_stride, n_rows, thread);
    tiles.template copy<false>(0, last_key, work.n_keys - last_key, thread);
    cp_async_commit();
#pragma unroll
    for (int t = 1; t < kStages - 1; t++) {
        if (t < n_tiles) tiles.template copy<true>(t, (t - 1) * kKeys, kKeys, thread);
        cp_async_commit();
    }

    QueryFragments<kHeadDim> q[kRowTiles];
    RowSoftmax rows[kRowTiles];
    Accumulator<kHeadDim> out[kRowTiles] = {};
    int stage = 0;
#pragma unroll 1
    for (int t = 0; t < n_tiles; t++) {
        // Tile t has landed, and all warps are done with tile t - 1, whose buffer is filled next.
        cp_async_wait<kStages - 2>();
        sync_threads();
        if (t == 0) begun();
        const int t_ahead = t + kStages - 1;
        const int stage_ahead = stage == 0 ? kStages - 1 : stage - 1;
        if (t_ahead < n_tiles) {
            tiles.template copy<true>(stage_ahead, (t_ahead - 1) * kKeys, kKeys, opaque(thread));
        }
        // A group for each t, empty or not: the count of groups says which tile has landed.
        cp_async_commit();

        if (has_rows) {
            const SharedAddress keys = tiles.stage(stage);
            if (!Traits::kKeepsQueries || t == 0) load_queries<kHeadDim>(q, own, opaque(lane));
            Accumulator<kKeys> scores[kRowTiles];
            multiply_by_keys<Element, kHeadDim, kKeys>(scores, q, keys, opaque(lane));
            if (t == 0 && work.n_keys % kKeys != 0) {
#pragma unroll
                for (int r = 0; r < kRowTiles; r++) {
                    mask_keys<kKeys>(scores[r], work.n_keys - last_key, lane);
                }
            }
            update_maxima<kKeys, kHeadDim>(rows, out, scores, p.scale_log2);
            add_weighted_values<Element, kHeadDim, kKeys>(
                out, rows, scores, keys + Traits::kKeyBytes, p.scale_log2, opaque(lane));
        }
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    if (!has_rows) return;

    // Each lane has read the queries that the output takes the place of.
    sync_warp();
#pragma unroll
    for (int r = 0; r < kRowTiles; r++) {
        float factors[2];
        rows[r].normalise(factors);
        put_rows<Element, kHeadDim>(own + r * kFragment * Traits::kRowBytes, out[r], factors, lane);
    }
    sync_warp();
    store_rows<kHeadDim, Traits::kWarpRows>(out_rows_from<Element>(p, row + warp_row, work.head),
                                            p.heads * kHeadDim, own, n_rows - warp_row, lane);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kResidentBlocks)
key_loop_kernel(const __grid_constant__ AttentionLaunch p) {
    clear_tail(p);
    for_each_item(p, count_items(p), shared_memory() + Traits::kSharedBytes - 16,
                  [&](const Work& work, auto begun) {
                      attend_key_loop<Traits>(p, work, shared_memory(), begun);
                  });
}

}  // namespace encoder_fast
