// Which rows a block works on: query tiles by arithmetic, or from a list, the longest first.
//
// cu_seqlens lies on the device and the host does not wait for it. Where most tiles of a regular
// grid have rows, a block finds its own by a division. Otherwise a small kernel lists the tiles
// that there are, and as many blocks as the device holds take one after the other from the list.

#pragma once

#include "attention/launch_params.cuh"
#include "launch.cuh"
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

// What a sequence has of the tokens that there are. Nobody checks cu_seqlens on the device: with
// numbers that are none, a loop over keys would run for seconds, outside of every operand.
EF_DEVICE void keep_within(const AttentionLaunch& p, int& begin, int& length) {
    begin = begin < 0 ? 0 : begin > p.total ? p.total : begin;
    length = length < p.total - begin ? length : p.total - begin;
}

// As many tiles as sequences that do not overlap can have.
EF_DEVICE int most_tiles(const AttentionLaunch& p) { return p.total / p.tile_rows + p.batch; }

EF_DEVICE int count_items(const AttentionLaunch& p) {
    if (!p.listed) return p.batch * p.tiles_per_sequence * p.heads;
    const int tiles = load_global(static_cast<const int*>(p.workspace));
    const int most = most_tiles(p);
    return (tiles < most ? tiles : most) * p.heads;
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
    keep_within(p, work.begin, work.n_keys);
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
        const auto begun = [&] {
            if (asks) store_shared(slot, next);
        };
        if (work.first_row < work.n_keys) {
            attend(work, begun);
        } else if (p.listed) {
            sync_threads();
            begun();
        }
        if (!p.listed) return;
        // All are done with the tiles in shared memory, and see the slot.
        sync_threads();
        const int taken = load_shared<int>(slot);
        // The counter only grows. Whatever the slot says, no block runs for ever.
        if (taken <= item) return;
        item = taken;
    }
}

// Starts the kernel that writes the list. In list_tiles.cu.
void list_tiles(const AttentionLaunch& p, Stream stream);

}  // namespace encoder_fast
