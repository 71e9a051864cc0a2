// What the loop copies to shared memory for a tile: keys, values and a block of positions.
//
// The ring holds the rows of the position tables in order of distance, in slots of kPositionBlock.
// The last tile of keys goes first, so each further tile asks for the distances of one more slot,
// behind those that the tile before has left to it. A tile needs one slot more than there are warps.

#pragma once

#include "attention/rows.cuh"
#include "attention/tile_list.cuh"
#include "disentangled/launch_params.cuh"
#include "disentangled/traits.cuh"
#include "ptx.cuh"

namespace encoder_fast {

template <class Traits>
struct TileCopies {
    using Layout = RowLayout<Traits::kHeadDim>;
    static constexpr int kRowsAtOnce = Traits::kThreads / Layout::kChunks;
    static constexpr int kOfThread = kPositionBlock / kRowsAtOnce;
    static_assert(kPositionBlock % kRowsAtOnce == 0);
    static_assert(Traits::kKeys == kPositionBlock);

    const DisentangledLaunch& p;
    const Work& work;
    int row, chunk_bytes;
    SharedAddress offset;  // of this thread's first row in a block

    EF_DEVICE TileCopies(const DisentangledLaunch& p, const Work& work, int thread)
        : p(p),
          work(work),
          row(thread / Layout::kChunks),
          chunk_bytes(thread % Layout::kChunks * kChunkBytes),
          offset(Layout::offset(row, thread % Layout::kChunks)) {}

    // Keys and values of a tile. Rows that the sequence does not have become zeros; with kWhole
    // there are none of them.
    template <bool kWhole>
    EF_DEVICE void copy_keys(SharedAddress stage, int tile) const {
        copy_tokens<kWhole>(stage, p.keys, tile);
        copy_tokens<kWhole>(stage + Traits::kKeyBytes, p.values, tile);
    }

    // The distances of the last warp's queries to the tile's first key: the ones that this tile
    // needs and the tile behind it does not. A `tile` behind the last has those of the warps before.
    EF_DEVICE void copy_positions(SharedAddress slot, int tile) const {
        const int index =
            work.first_row + p.reach + (Traits::kWarps - 1 - tile) * kPositionBlock;
        int table_rows[kOfThread];
#pragma unroll
        for (int i = 0; i < kOfThread; i++) {
            const int own = index + row + i * kRowsAtOnce;
            const int above = own < 0 ? 0 : own;
            const int clamped = above < 2 * p.reach ? above : 2 * p.reach;
            table_rows[i] = load_global(p.row_of_distance + clamped);
        }
        if constexpr (Traits::kHasKeyTable) copy_table(slot, p.key_positions, table_rows);
        if constexpr (Traits::kHasQueryTable) {
            copy_table(slot + Traits::kQueryTable, p.query_positions, table_rows);
        }
    }

  private:
    template <bool kWhole>
    EF_DEVICE void copy_tokens(SharedAddress target, const StridedRows& x, int tile) const {
        const int first = tile * Traits::kKeys;
        const char* source = row_from(x, work.begin + first + row, work.head) + chunk_bytes;
#pragma unroll
        for (int i = 0; i < kOfThread; i++) {
            const bool there = kWhole || first + row + i * kRowsAtOnce < work.n_keys;
            // A row that is not there is not read either.
            cp_async<kChunkBytes>(target + offset + i * kRowsAtOnce * Layout::kRowBytes, source,
                                  there ? kChunkBytes : 0);
            source += kRowsAtOnce * x.row_bytes;
        }
    }

    EF_DEVICE void copy_table(SharedAddress target, const StridedRows& x,
                              const int (&table_rows)[kOfThread]) const {
        const char* const head_data = row_from(x, 0, work.head) + chunk_bytes;
#pragma unroll
        for (int i = 0; i < kOfThread; i++) {
            cp_async<kChunkBytes>(target + offset + i * kRowsAtOnce * Layout::kRowBytes,
                                  head_data + static_cast<int64_t>(table_rows[i]) * x.row_bytes);
        }
    }
};

// The slot `slots` behind a slot, at most all of them, both as addresses from the ring's beginning.
template <class Traits>
EF_DEVICE int slot_behind(int slot, int slots) {
    // Below the end the difference is negative, and as an unsigned number the larger one.
    const uint32_t there = slot + slots * Traits::kSlotBytes;
    const uint32_t wrapped = there - Traits::kRingBytes;
    return static_cast<int>(there < wrapped ? there : wrapped);
}

}  // namespace encoder_fast
