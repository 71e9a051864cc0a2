// How disentangled attention is cut: tiles, warps, and what a block may use.

#pragma once

#include "attention/traits.cuh"

namespace encoder_fast {

// Keys of a tile, and rows of the position tables that each further tile asks for.
constexpr int kPositionBlock = 32;

// kWarps warps with 32 query rows each, against tiles of 32 keys. Two tiles of keys and values are
// in shared memory or on their way; so are the rows of the position tables for all distances of
// one tile of keys and of the next.
template <class Element_, int kHeadDim_, bool kHasKeyTable_, bool kHasQueryTable_, int kWarps_,
          int kResidentBlocks_>
struct DisentangledTraits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr bool kHasKeyTable = kHasKeyTable_;
    static constexpr bool kHasQueryTable = kHasQueryTable_;
    static constexpr int kWarps = kWarps_;
    static constexpr int kResidentBlocks = kResidentBlocks_;

    static constexpr int kKeys = kPositionBlock;
    static constexpr int kStages = 2;
    static constexpr int kRowTiles = 2;
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kWarpRows = kRowTiles * kFragment;
    static constexpr int kRows = kWarps * kWarpRows;

    // Queries and keys of one tile are kRows + kKeys - 1 distances apart at most.
    static constexpr int kRingBlocks = kRows / kPositionBlock + 2;

    static constexpr int kRowBytes = kHeadDim * 2;
    static constexpr int kQueryBytes = kRows * kRowBytes;
    static constexpr int kKeyBytes = kKeys * kRowBytes;
    static constexpr int kStageBytes = 2 * kKeyBytes;
    static constexpr int kSlotBytes = kPositionBlock * kRowBytes;
    static constexpr int kRingBytes = kRingBlocks * kSlotBytes;
    // Where the ring of pos_query lies, behind that of pos_key.
    static constexpr int kQueryTable = kHasKeyTable ? kRingBytes : 0;
    static constexpr int kTables = (kHasKeyTable ? 1 : 0) + (kHasQueryTable ? 1 : 0);
    // The item's work and the number of the next lie behind all else.
    static constexpr int kSharedBytes =
        kQueryBytes + kStages * kStageBytes + kTables * kRingBytes + 32;

    static_assert(sizeof(Element) == 2);
    static_assert(kHeadDim == 32 || kHeadDim == 64);
    static_assert(kTables > 0, "without tables it is plain attention");
    static_assert(kWarpRows == kPositionBlock, "a warp's distances are two blocks of the ring");
    static_assert(kSharedBytes <= kMostSharedBytes);
    static_assert((kSharedBytes + kSystemSharedBytes) * kResidentBlocks <=
                  kSharedBytesPerMultiprocessor);
};

// The tiles that ship. docs/kernels/disentangled_attention.md says why.
template <class Element, int kHeadDim, bool kHasKeyTable, bool kHasQueryTable>
struct DisentangledTiles {
    using UpTo64 = DisentangledTraits<Element, kHeadDim, kHasKeyTable, kHasQueryTable, 2, 3>;
    using Longer = DisentangledTraits<Element, kHeadDim, kHasKeyTable, kHasQueryTable, 4, 2>;
};

}  // namespace encoder_fast
