// Attention where one tile holds all keys of a sequence: a softmax in a single pass.
//
// Keys and values are read once for all rows of the query tile. What a sequence does not have of
// the tile's keys is left out in chunks, so a short sequence among longer ones costs little. For
// the shortest ones a warp takes an item of its own and meets nobody: four of them make a block.

#pragma once

#include "attention/launch_params.cuh"
#include "attention/products.cuh"
#include "attention/rows.cuh"
#include "attention/softmax.cuh"
#include "attention/tile_list.cuh"
#include "attention/traits.cuh"
#include "ptx.cuh"

namespace encoder_fast {

// A barrier for the threads of one item.
template <class Traits>
EF_DEVICE void sync_item() {
    if constexpr (Traits::kItems > 1) {
        sync_warp();
    } else {
        sync_threads();
    }
}

template <class Traits>
using ChunkScores = Accumulator<Traits::kChunkKeys>[1];

// Scores of 16 rows against all keys, and their maxima.
template <class Traits>
EF_DEVICE void score_rows(ChunkScores<Traits> (&scores)[Traits::kChunks], RowSoftmax& rows,
                          SharedAddress queries, SharedAddress keys, int n_keys, float scale_log2,
                          int lane) {
    constexpr int kChunkKeys = Traits::kChunkKeys;
    QueryFragments<Traits::kHeadDim> q[1];
    load_queries<Traits::kHeadDim>(q, queries, lane);
    float maxima[2] = {-FLT_MAX, -FLT_MAX};
#pragma unroll
    for (int c = 0; c < Traits::kChunks; c++) {
        const int first_key = c * kChunkKeys;
        if (c > 0 && first_key >= n_keys) continue;
        multiply_by_keys<typename Traits::Element, Traits::kHeadDim, kChunkKeys>(
            scores[c], q, keys + first_key * Traits::kRowBytes, lane);
        if (first_key + kChunkKeys > n_keys) {
            mask_keys<kChunkKeys>(scores[c][0], n_keys - first_key, lane);
        }
        raise_maxima<kChunkKeys>(maxima, scores[c][0]);
    }
    rows.maxima[0] = row_maximum(maxima[0]) * scale_log2;
    rows.maxima[1] = row_maximum(maxima[1]) * scale_log2;
}

// From the scores of 16 rows to their output, in shared memory.
template <class Traits>
EF_DEVICE void finish_rows(SharedAddress out_rows, RowSoftmax (&rows)[1],
                           ChunkScores<Traits> (&scores)[Traits::kChunks], SharedAddress values,
                           int n_keys, float scale_log2, int lane) {
    using Element = typename Traits::Element;
    constexpr int kHeadDim = Traits::kHeadDim;
    Accumulator<kHeadDim> out[1] = {};
#pragma unroll
    for (int c = 0; c < Traits::kChunks; c++) {
        const int first_key = c * Traits::kChunkKeys;
        if (c > 0 && first_key >= n_keys) continue;
        add_weighted_values<Element, kHeadDim, Traits::kChunkKeys>(
            out, rows, scores[c], values + first_key * Traits::kRowBytes, scale_log2, lane);
    }
    float factors[2];
    rows[0].normalise(factors);
    put_rows<Element, kHeadDim>(out_rows, out[0], factors, lane);
}

// `begun` is called once by each thread when the item's barrier has been passed for the first time.
template <class Traits, class Begun>
EF_DEVICE void attend_one_tile(const AttentionLaunch& p, const Work& work, SharedAddress queries,
                               Begun begun) {
    using Element = typename Traits::Element;
    constexpr int kHeadDim = Traits::kHeadDim, kThreads = Traits::kItemThreads;
    const int thread = opaque(static_cast<int>(threadIdx.x)) % kThreads;
    const SharedAddress keys = queries + Traits::kQueryBytes;
    const SharedAddress values = keys + Traits::kKeyBytes;
    const int n_keys = work.n_keys, row = work.begin + work.first_row;
    const int rows_left = n_keys - work.first_row;
    const int n_rows = rows_left < p.tile_rows ? rows_left : p.tile_rows;

    copy_rows_async<kHeadDim, Traits::kRows, kThreads, false>(
        queries, rows_from<Element>(p.q, row, work.head), p.q.row_stride, n_rows, thread);
    copy_rows_async<kHeadDim, Traits::kKeys, kThreads, false>(
        keys, rows_from<Element>(p.k, work.begin, work.head), p.k.row_stride, n_keys, thread);
    cp_async_commit();
    copy_rows_async<kHeadDim, Traits::kKeys, kThreads, false>(
        values, rows_from<Element>(p.v, work.begin, work.head), p.v.row_stride, n_keys, thread);
    cp_async_commit();

    cp_async_wait<1>();
    sync_item<Traits>();
    begun();

    // The second condition is for the compiler: where there is one pass, there is no loop.
#pragma unroll 1
    for (int pass = 0; pass < n_rows && pass < Traits::kRows; pass += Traits::kPassRows) {
        const int lane = opaque(thread % kWarpSize);
        const int warp_row = pass + thread / kWarpSize * kFragment;
        // The rows of this pass that a warp has are its own until they are written.
        const SharedAddress own = queries + warp_row * Traits::kRowBytes;
        const bool has_rows = warp_row < n_rows;
        ChunkScores<Traits> scores[Traits::kChunks];
        RowSoftmax rows[1];
        if (has_rows) score_rows<Traits>(scores, rows[0], own, keys, n_keys, p.scale_log2, lane);
        if (pass == 0) {
            cp_async_wait<0>();
            sync_item<Traits>();
        }
        if (has_rows) {
            // Each lane has read the queries that the output takes the place of.
            sync_warp();
            finish_rows<Traits>(own, rows, scores, values, n_keys, p.scale_log2, lane);
            sync_warp();
            store_rows<kHeadDim, kFragment>(out_rows_from<Element>(p, row + warp_row, work.head),
                                            p.heads * kHeadDim, own, n_rows - warp_row, lane);
        }
    }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kResidentBlocks)
one_tile_kernel(const __grid_constant__ AttentionLaunch p) {
    clear_tail(p);
    const int n_items = count_items(p);
    if constexpr (Traits::kItems > 1) {
        const int item = static_cast<int>(blockIdx.x) * Traits::kItems + warp_id();
        if (item >= n_items) return;
        const Work work = find_work(p, item);
        const SharedAddress queries = shared_memory() + warp_id() * Traits::kItemBytes;
        if (work.n_keys > 0) attend_one_tile<Traits>(p, work, queries, [] {});
    } else {
        for_each_item(p, n_items, shared_memory() + Traits::kItemBytes,
                      [&](const Work& work, auto begun) {
                          attend_one_tile<Traits>(p, work, shared_memory(), begun);
                      });
    }
}

}  // namespace encoder_fast
