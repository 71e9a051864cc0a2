// Rows of a head in shared memory: where each 16 bytes lie, and the ways in and out.
//
// A row is cut into chunks of 16 bytes. They are permuted within the row so that the 8 rows of a
// matrix that ldmatrix reads, and the 128 bytes that 8 threads write, fall on all 32 banks once.

#pragma once

#include "ptx.cuh"

namespace encoder_fast {

constexpr int kChunkBytes = 16;

template <int kHeadDim>
struct RowLayout {
    static constexpr int kRowBytes = kHeadDim * 2;
    static constexpr int kChunks = kRowBytes / kChunkBytes;
    // Rows that lie side by side across the banks need no permutation among themselves.
    static constexpr int kRowsAcrossBanks = kChunks < 8 ? 8 / kChunks : 1;
    static constexpr int kFlips = kChunks < 8 ? kChunks : 8;

    // Repeats every 8 rows.
    static constexpr EF_DEVICE int flip(int row) { return row / kRowsAcrossBanks % kFlips; }

    static constexpr EF_DEVICE SharedAddress offset(int row, int chunk) {
        return row * kRowBytes + (chunk ^ flip(row)) * kChunkBytes;
    }

    // Whether 8 rows of a chunk, and 8 chunks one behind the other, never share a bank.
    static constexpr EF_DEVICE bool is_free_of_conflicts() {
        for (int i = 0; i < kChunks; i++) {
            unsigned down = 0, across = 0;
            for (int j = 0; j < 8; j++) {
                const int next = i / 8 * 8 + j;
                down |= 1u << offset(j, i) / kChunkBytes % 8;
                across |= 1u << offset(next / kChunks, next % kChunks) / kChunkBytes % 8;
            }
            if (down != 0xff || across != 0xff) return false;
        }
        return true;
    }
};

static_assert(RowLayout<32>::is_free_of_conflicts());
static_assert(RowLayout<64>::is_free_of_conflicts());
static_assert(RowLayout<128>::is_free_of_conflicts());

// Starts copies of kRows rows of one head by kThreads threads. Rows from n_rows on, which the
// sequence does not have, become zeros and are not read; with kWhole there are none of them.
template <int kHeadDim, int kRows, int kThreads, bool kWhole, class Element>
EF_DEVICE void copy_rows_async(SharedAddress target, const Element* source, int64_t row_stride,
                               int n_rows, int thread) {
    using Layout = RowLayout<kHeadDim>;
    constexpr int kRowsAtOnce = kThreads / Layout::kChunks;
    static_assert(kRows % kRowsAtOnce == 0);
    const int chunk = thread % Layout::kChunks;
    const int first = thread / Layout::kChunks;
    source += chunk * (kChunkBytes / 2);
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; i++) {
        const int row = first + i * kRowsAtOnce;
        const bool there = kWhole || row < n_rows;
        cp_async<kChunkBytes>(target + Layout::offset(row, chunk),
                              source + (there ? row : 0) * row_stride, there ? kChunkBytes : 0);
    }
}

// Writes n_rows of the kRows rows that a warp has in shared memory to global memory.
template <int kHeadDim, int kRows, class Element>
EF_DEVICE void store_rows(Element* target, int row_stride, SharedAddress source, int n_rows,
                          int lane) {
    using Layout = RowLayout<kHeadDim>;
    constexpr int kRowsAtOnce = kWarpSize / Layout::kChunks;
    const int chunk = lane % Layout::kChunks;
    const int first = lane / Layout::kChunks;
    target += chunk * (kChunkBytes / 2);
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; i++) {
        const int row = first + i * kRowsAtOnce;
        if (row < n_rows) {
            const uint4 value = load_shared<uint4>(source + Layout::offset(row, chunk));
            store_global(reinterpret_cast<uint4*>(target + row * row_stride), value);
        }
    }
}

}  // namespace encoder_fast
