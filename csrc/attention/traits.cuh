// How each length class is cut: tiles, warps, stages, and what a block may use.
//
// A class is picked by the longest sequence (plan.cuh). Up to 256 keys one tile holds all keys of a
// sequence, and the softmax is a single pass; beyond, a loop walks over tiles of keys. What a block
// may take of a multiprocessor is stated as `kResidentBlocks`: __launch_bounds__ holds the compiler
// to the registers, the assertions here hold the tiles to the shared memory.

#pragma once

#include "attention/fragments.cuh"
#include "ptx.cuh"

namespace encoder_fast {

constexpr int kRegistersPerMultiprocessor = 64 * 1024;
constexpr int kMostRegisters = 255;
// A block may have 99 KB on sm_89 and sm_120, more elsewhere; every class runs on each of them.
constexpr int kMostSharedBytes = 99 * 1024;
// All blocks together on sm_90, each with 1 KB for the system.
constexpr int kSharedBytesPerMultiprocessor = 228 * 1024;
constexpr int kSystemSharedBytes = 1024;

template <int kThreads, int kResidentBlocks>
constexpr int register_limit() {
    const int even = kRegistersPerMultiprocessor / (kThreads * kResidentBlocks) / 8 * 8;
    return even < kMostRegisters ? even : kMostRegisters;
}

// All keys of an item, a (sequence, head) pair, lie in one tile of kKeys. kWarpsPerItem warps take
// kFragment query rows each, and come again until the kRows of a query tile are done. A block has
// kItems items side by side, which share nothing.
template <class Element_, int kHeadDim_, int kKeys_, int kRows_, int kWarpsPerItem_, int kItems_,
          int kResidentBlocks_>
struct OneTileTraits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kKeys = kKeys_;
    static constexpr int kRows = kRows_;
    static constexpr int kWarpsPerItem = kWarpsPerItem_;
    static constexpr int kItems = kItems_;
    static constexpr int kResidentBlocks = kResidentBlocks_;

    // Keys that are skipped together where a sequence has none of them.
    static constexpr int kChunkKeys = kKeys < 64 ? kKeys : 64;
    static constexpr int kChunks = kKeys / kChunkKeys;
    static constexpr int kPassRows = kWarpsPerItem * kFragment;
    static constexpr int kItemThreads = kWarpsPerItem * kWarpSize;
    static constexpr int kThreads = kItems * kItemThreads;

    static constexpr int kRowBytes = kHeadDim * 2;
    static constexpr int kQueryBytes = kRows * kRowBytes;
    static constexpr int kKeyBytes = kKeys * kRowBytes;
    static constexpr int kItemBytes = kQueryBytes + 2 * kKeyBytes;
    // The next item's number lies behind the tiles.
    static constexpr int kSharedBytes = kItems * kItemBytes + 16;

    static constexpr int kRegisterLimit = register_limit<kThreads, kResidentBlocks>();
    // Scores in float32, then weights in 16 bits beside the output's accumulator.
    static constexpr int kScoreRegisters = kKeys / 2;
    static constexpr int kOutRegisters = kHeadDim / 2;

    static_assert(sizeof(Element) == 2);
    static_assert(kHeadDim == 32 || kHeadDim == 64 || kHeadDim == 128);
    static_assert(kKeys % kChunkKeys == 0 && kChunkKeys % kFragment == 0);
    static_assert(kRows % kPassRows == 0, "the last pass would read rows of another tile");
    static_assert(kItems == 1 || kWarpsPerItem == 1, "items side by side meet at no barrier");
    static_assert(kSharedBytes <= kMostSharedBytes);
    static_assert((kSharedBytes + kSystemSharedBytes) * kResidentBlocks <=
                  kSharedBytesPerMultiprocessor);
    static_assert(kScoreRegisters + 24 <= kRegisterLimit);
    static_assert(kScoreRegisters / 2 + kOutRegisters + 24 <= kRegisterLimit);
};

// A tile of kWarps * kRowTiles * kFragment query rows against tiles of kKeys keys, of which
// kStages are in shared memory or on their way.
template <class Element_, int kHeadDim_, int kKeys_, int kWarps_, int kRowTiles_, int kStages_,
          int kResidentBlocks_>
struct KeyLoopTraits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kKeys = kKeys_;
    static constexpr int kWarps = kWarps_;
    static constexpr int kRowTiles = kRowTiles_;
    static constexpr int kStages = kStages_;
    static constexpr int kResidentBlocks = kResidentBlocks_;

    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kWarpRows = kRowTiles * kFragment;
    static constexpr int kRows = kWarps * kWarpRows;

    static constexpr int kRowBytes = kHeadDim * 2;
    static constexpr int kQueryBytes = kRows * kRowBytes;
    static constexpr int kKeyBytes = kKeys * kRowBytes;
    static constexpr int kStageBytes = 2 * kKeyBytes;
    static constexpr int kSharedBytes = kQueryBytes + kStages * kStageBytes + 16;

    static constexpr int kRegisterLimit = register_limit<kThreads, kResidentBlocks>();
    static constexpr int kScoreRegisters = kRowTiles * kKeys / 2;
    static constexpr int kOutRegisters = kRowTiles * kHeadDim / 2;
    // Beside these: fragments on their way, addresses, what the loop counts.
    static constexpr int kOtherRegisters = 72;
    // Queries that find no place are read again for each tile of keys.
    static constexpr int kQueryRegisters = kRowTiles * kHeadDim / 4;
    static constexpr bool kKeepsQueries =
        kScoreRegisters + kOutRegisters + kQueryRegisters + kOtherRegisters <= kRegisterLimit;

    static_assert(sizeof(Element) == 2);
    static_assert(kHeadDim == 32 || kHeadDim == 64 || kHeadDim == 128);
    static_assert(kKeys % kFragment == 0);
    static_assert(kStages >= 2, "the next tile is on its way while one is multiplied");
    static_assert(kSharedBytes <= kMostSharedBytes);
    static_assert((kSharedBytes + kSystemSharedBytes) * kResidentBlocks <=
                  kSharedBytesPerMultiprocessor);
    static_assert(kScoreRegisters + kOutRegisters + kOtherRegisters <= kRegisterLimit);
};

// The tiles that ship. docs/kernels/cuda_attention.md says why.
template <class Element, int kHeadDim>
struct AttentionTiles;

template <class Element>
struct AttentionTiles<Element, 32> {
    using UpTo32 = OneTileTraits<Element, 32, 32, 32, 1, 4, 6>;
    using UpTo64 = OneTileTraits<Element, 32, 64, 64, 4, 1, 6>;
    using UpTo128 = OneTileTraits<Element, 32, 128, 128, 4, 1, 4>;
    using UpTo256 = OneTileTraits<Element, 32, 256, 128, 4, 1, 2>;
    using Longer = KeyLoopTraits<Element, 32, 64, 4, 2, 3, 3>;
};

template <class Element>
struct AttentionTiles<Element, 64> {
    using UpTo32 = OneTileTraits<Element, 64, 32, 32, 1, 4, 4>;
    using UpTo64 = OneTileTraits<Element, 64, 64, 64, 4, 1, 4>;
    using UpTo128 = OneTileTraits<Element, 64, 128, 128, 4, 1, 3>;
    using Longer = KeyLoopTraits<Element, 64, 64, 4, 2, 2, 2>;
    using UpTo256 = Longer;
};

template <class Element>
struct AttentionTiles<Element, 128> {
    using UpTo32 = OneTileTraits<Element, 128, 32, 32, 1, 4, 2>;
    using UpTo64 = OneTileTraits<Element, 128, 64, 64, 4, 1, 3>;
    using UpTo128 = OneTileTraits<Element, 128, 128, 64, 4, 1, 2>;
    using Longer = KeyLoopTraits<Element, 128, 32, 4, 2, 3, 2>;
    using UpTo256 = Longer;
};

}  // namespace encoder_fast
