// From a call to kernels: picks the tiles by the longest sequence, and the terms that there are.

#pragma once

#include <string>

#include "attention/cut.cuh"
#include "dispatch.cuh"
#include "disentangled/key_loop.cuh"
#include "launch.cuh"

namespace encoder_fast {

void disentangled_attention_32(const DisentangledArguments& arguments, Stream stream);
void disentangled_attention_64(const DisentangledArguments& arguments, Stream stream);

template <class Traits>
void launch_disentangled(const DisentangledArguments& arguments, Stream stream) {
    const Cut cut = cut_tokens<Traits>(arguments);
    if (cut.params.listed) list_tiles(cut.params, stream);
    const DisentangledLaunch params{cut.params,
                                    strided_rows(arguments.k),
                                    strided_rows(arguments.v),
                                    strided_rows(arguments.pos_key),
                                    strided_rows(arguments.pos_query),
                                    arguments.row_of_distance,
                                    arguments.reach};
    launch(disentangled_kernel<Traits>, {cut.blocks, Traits::kThreads, Traits::kSharedBytes},
           params, stream, "disentangled " + describe(arguments));
}

template <int kHeadDim, bool kHasKeyTable, bool kHasQueryTable>
void disentangled_attention_by_terms(const DisentangledArguments& arguments, Stream stream) {
    with_half_type(arguments.dtype, [&](auto element) {
        using Tiles = DisentangledTiles<decltype(element), kHeadDim, kHasKeyTable, kHasQueryTable>;
        if (longest_sequence(arguments) <= Tiles::UpTo64::kRows) {
            launch_disentangled<typename Tiles::UpTo64>(arguments, stream);
        } else {
            launch_disentangled<typename Tiles::Longer>(arguments, stream);
        }
    });
}

template <int kHeadDim>
void disentangled_attention_of(const DisentangledArguments& arguments, Stream stream) {
    if (arguments.pos_query.data == nullptr) {
        disentangled_attention_by_terms<kHeadDim, true, false>(arguments, stream);
    } else if (arguments.pos_key.data == nullptr) {
        disentangled_attention_by_terms<kHeadDim, false, true>(arguments, stream);
    } else {
        disentangled_attention_by_terms<kHeadDim, true, true>(arguments, stream);
    }
}

}  // namespace encoder_fast
