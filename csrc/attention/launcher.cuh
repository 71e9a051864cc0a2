// From a call to kernels: picks the tiles by the longest sequence.

#pragma once

#include <string>

#include "attention/cut.cuh"
#include "attention/key_loop.cuh"
#include "attention/one_tile.cuh"
#include "dispatch.cuh"
#include "launch.cuh"

namespace encoder_fast {

void attention_heads_of_32(const AttentionArguments& arguments, Stream stream);
void attention_heads_of_64(const AttentionArguments& arguments, Stream stream);
void attention_heads_of_128(const AttentionArguments& arguments, Stream stream);

template <class Traits>
void launch_attention(const AttentionArguments& arguments, Stream stream) {
    const Cut cut = cut_tokens<Traits>(arguments);
    if (cut.params.listed) list_tiles(cut.params, stream);
    void (*kernel)(AttentionLaunch);
    if constexpr (kSinglePass<Traits>) {
        kernel = one_tile_kernel<Traits>;
    } else {
        kernel = key_loop_kernel<Traits>;
    }
    launch(kernel, {cut.blocks, Traits::kThreads, Traits::kSharedBytes}, cut.params, stream,
           describe(arguments));
}

template <int kHeadDim>
void attention_of(const AttentionArguments& arguments, Stream stream) {
    const int longest = longest_sequence(arguments);
    with_half_type(arguments.dtype, [&](auto element) {
        using Tiles = AttentionTiles<decltype(element), kHeadDim>;
        if (longest <= 32) {
            launch_attention<typename Tiles::UpTo32>(arguments, stream);
        } else if (longest <= 64) {
            launch_attention<typename Tiles::UpTo64>(arguments, stream);
        } else if (longest <= 128) {
            launch_attention<typename Tiles::UpTo128>(arguments, stream);
        } else if (longest <= 256) {
            launch_attention<typename Tiles::UpTo256>(arguments, stream);
        } else {
            launch_attention<typename Tiles::Longer>(arguments, stream);
        }
    });
}

}  // namespace encoder_fast
