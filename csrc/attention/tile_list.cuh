// Which rows a block works on: query tiles by arithmetic, or from a list, the longest first.
//
// cu_seqlens lies on the device and the host does not wait for it. Where most tiles of a regular
// grid have rows, a block finds its own by a division. Otherwise a small kernel lists the tiles
// that there are, and as many blocks as the device holds take one after the other from the list.

#pragma once

#include "attention/launch_params.cuh"
#include "ptx.cuh"

namespace encoder_fast {

// One query tile of one head: rows first_row and on of the sequence that begins at `begin`.
struct Work {
    int begin, n_keys, first_row, head;
};

// The list: first the number of tiles and how many items were taken beyond each block's first,
// then begin, length and first row of each tile. An item is a tile and a head.
constexpr int kListEntryBytes = sizeof(uint4);

// Enough for tiles of kLeastTileRows rows: a sequence has at most one that is not full.
constexpr int kLeastTileRows = 64;

inline int64_t list_entries(int64_t total, int64_t batch) {
    return 1 + total / kLeastTileRows + batch;
}

EF_DEVICE int count_items(const AttentionLaunch& p) {
    const int tiles = p.listed ? load_global(static_cast<const int*>(p.workspace))
                               : p.batch * p.tiles_per_sequence;
    return tiles * p.heads;
}

// Heads run fastest: neighbouring items read neighbouring columns of the same rows.
EF_DEVICE Work find_work(const AttentionLaunch& p, int item) {
    const int tile = item / p.heads;
    Work work;
    work.head = item - tile * p.heads;
    if (p.listed) {
        const uint4 entry = load_global(static_cast<const uint4*>(p.workspace) + 1 + tile);
        work.begin = static_cast<int>(entry.x);
        work.n_keys = static_cast<int>(entry.y);
        work.first_row = static_cast<int>(entry.z);
    } else {
        const int sequence = tile / p.tiles_per_sequence;
        work.begin = load_global(p.cu_seqlens + sequence);
        work.n_keys = load_global(p.cu_seqlens + sequence + 1) - work.begin;
        work.first_row = (tile - sequence * p.tiles_per_sequence) * p.tile_rows;
    }
    return work;
}

// The next item of the list that no block has taken.
EF_DEVICE int take_item(const AttentionLaunch& p) {
    return static_cast<int>(gridDim.x) + atomic_add_global(static_cast<int*>(p.workspace) + 1, 1);
}

// Calls attend(work, begun) for this block's items, with all of its threads. Of the regular grid
// that is one, if it has rows. From the list it is as many as the block comes to: the first thread
// asks for the next one early, and `begun`, which each thread calls once behind a barrier of the
// block, leaves the answer in `slot`.
template <class Attend>
EF_DEVICE void for_each_item(const AttentionLaunch& p, int n_items, SharedAddress slot,
                             Attend attend) {
    const bool asks = p.listed && threadIdx.x == 0;
    int item = static_cast<int>(blockIdx.x);
    while (item < n_items) {
        const Work work = find_work(p, item);
        const int next = asks ? take_item(p) : 0;
        if (work.first_row < work.n_keys) {
            attend(work, [&] {
                if (asks) store_shared(slot, next);
            });
        }
        if (!p.listed) return;
        // All are done with the tiles in shared memory, and see the slot.
        sync_threads();
        item = load_shared<int>(slot);
    }
}

constexpr int kListThreads = 512;
// A bucket is a length in steps of kBucketKeys, the longest first; the first holds all beyond.
constexpr int kBuckets = 256;
constexpr int kBucketKeys = 64;
constexpr int kListSharedBytes = kBuckets * 4;

EF_DEVICE int bucket_of(int length) {
    const int steps = (length + kBucketKeys - 1) / kBucketKeys;
    return kBuckets - (steps < kBuckets ? steps : kBuckets);
}

// Turns the buckets' counts into where each begins, by one warp. Returns the sum.
EF_DEVICE int begin_buckets(SharedAddress buckets) {
    constexpr int kOfLane = kBuckets / kWarpSize;
    const SharedAddress own = buckets + lane_id() * kOfLane * 4;
    int counts[kOfLane], sum = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; i++) {
        counts[i] = load_shared<int>(own + 4 * i);
        sum += counts[i];
    }
    int end = sum;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const int below = shuffle_up(end, distance);
        end += lane_id() >= distance ? below : 0;
    }
    int begin = end - sum;
#pragma unroll
    for (int i = 0; i < kOfLane; i++) {
        store_shared(own + 4 * i, begin);
        begin += counts[i];
    }
    return shuffle(end, kWarpSize - 1);
}

// One block. The order within a bucket is left to chance; no result depends on it.
template <class Launch>
__global__ void __launch_bounds__(kListThreads)
list_tiles_kernel(const __grid_constant__ Launch p) {
    const SharedAddress buckets = shared_memory();
    const int thread = static_cast<int>(threadIdx.x);
    uint4* const list = static_cast<uint4*>(p.workspace);

    for (int i = thread; i < kBuckets; i += kListThreads) store_shared(buckets + 4 * i, 0);
    sync_threads();
    for (int b = thread; b < p.batch; b += kListThreads) {
        const int length = load_global(p.cu_seqlens + b + 1) - load_global(p.cu_seqlens + b);
        const int tiles = (length + p.tile_rows - 1) / p.tile_rows;
        if (tiles > 0) atomic_add_shared(buckets + 4 * bucket_of(length), tiles);
    }
    sync_threads();
    if (thread < kWarpSize) {
        const uint32_t tiles = static_cast<uint32_t>(begin_buckets(buckets));
        if (thread == 0) store_global(list, uint4{tiles, 0, 0, 0});
    }
    sync_threads();
    for (int b = thread; b < p.batch; b += kListThreads) {
        const int begin = load_global(p.cu_seqlens + b);
        const int length = load_global(p.cu_seqlens + b + 1) - begin;
        const int tiles = (length + p.tile_rows - 1) / p.tile_rows;
        if (tiles == 0) continue;
        uint4* const first = list + 1 + atomic_add_shared(buckets + 4 * bucket_of(length), tiles);
        for (int i = 0; i < tiles; i++) {
            const uint32_t row = static_cast<uint32_t>(i * p.tile_rows);
            store_global(first + i, uint4{static_cast<uint32_t>(begin),
                                          static_cast<uint32_t>(length), row, 0});
        }
    }
}

}  // namespace encoder_fast
