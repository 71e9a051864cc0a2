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

// Starts the kernel that writes the list. In list_tiles.cu.
void list_tiles(const AttentionLaunch& p, Stream stream);

}  // namespace encoder_fast
