// The way to cut the tokens of a call into items: a regular grid, or a list of tiles.

#pragma once

#include <cmath>

#include "attention/launch_params.cuh"
#include "attention/tile_list.cuh"
#include "attention/traits.cuh"
#include "launch.cuh"

namespace encoder_fast {

template <class Traits>
constexpr bool kSinglePass = false;

template <class Element, int... kSizes>
constexpr bool kSinglePass<OneTileTraits<Element, kSizes...>> = true;

inline int longest_sequence(const AttentionArguments& a) {
    const int longest = a.max_seqlen < a.total ? a.max_seqlen : a.total;
    return longest > 1 ? longest : 1;
}

inline int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

// How a call was cut, and over how many blocks of threads.
struct Cut {
    AttentionLaunch params;
    int64_t blocks;
};

template <class Traits>
Cut cut_tokens(const AttentionArguments& arguments) {
    constexpr int64_t kMostItems = (int64_t{1} << 31) - 1;
    const int64_t processors = multiprocessors();
    const int64_t resident = processors * Traits::kResidentBlocks;
    const int64_t total = arguments.total, batch = arguments.batch, heads = arguments.heads;
    const int64_t longest = longest_sequence(arguments);

    AttentionLaunch p{arguments, 0.0f, Traits::kRows, 0, false};
    p.scale_log2 = static_cast<float>(arguments.softmax_scale * M_LOG2E);
    int items_a_block = 1;
    if constexpr (kSinglePass<Traits>) {
        items_a_block = Traits::kItems;
        // Too few tiles to go round: rather smaller ones than several passes in each.
        const bool few = batch * heads * divide_up(longest, Traits::kRows) < processors;
        if (few && Traits::kItems == 1) p.tile_rows = Traits::kPassRows;
    }
    p.tiles_per_sequence = static_cast<int>(divide_up(longest, p.tile_rows));
    int64_t items = batch * p.tiles_per_sequence * heads;
    int64_t blocks = divide_up(items, items_a_block);
    // A grid that the device holds at once needs no order, and one that is three quarters full
    // wastes less than it takes to write the list.
    const int64_t grid_rows = batch * p.tiles_per_sequence * p.tile_rows;
    p.listed = p.tiles_per_sequence > 1 && blocks > resident && 4 * total < 3 * grid_rows;
    if (p.listed) {
        items = (total / p.tile_rows + batch) * heads;
        blocks = items < resident ? items : resident;
    }
    // Blocks count beyond the last item before they stop.
    if (items + 2 * blocks * items_a_block > kMostItems) {
        throw LaunchError(describe(arguments) + ": too many tiles");
    }
    // Without sequences there are still rows to clear.
    if (blocks == 0) blocks = 1;
    return {p, blocks};
}

}  // namespace encoder_fast
