// The embedding stage: a gather from three tables, their sum, LayerNorm. In half precision a row
// costs 2 N bytes of the word table and 2 N bytes of output; the other tables come out of the L2
// cache.
//
// Ahead of bandwidth it is latency: a row can be asked for only when its id is there. So the ids are
// read two rows ahead, and the word's row while the row before it is reduced.
//
// An id outside its table reads nothing, and the token's row becomes NaN: the ids are known on the
// device alone, and to raise, the host would have to wait for them.

#include "embed_layer_norm.h"

#include "row_norm.cuh"

namespace encoder_fast {
namespace {

constexpr int64_t kNoToken = -1;

struct Ids {
    int64_t word, token_type, position;
};

EF_DEVICE int64_t load_id(const Lookup& lookup, int64_t token) {
    if (lookup.ids == nullptr) return 0;
    if (lookup.ids_are_int64) return load_global(static_cast<const int64_t*>(lookup.ids) + token);
    return load_global(static_cast<const int32_t*>(lookup.ids) + token);
}

EF_DEVICE Ids load_ids(const EmbedLayerNormArguments& p, int64_t token) {
    if (token >= p.tokens) return {kNoToken, kNoToken, kNoToken};
    return {load_id(p.word, token), load_id(p.token_type, token), load_id(p.position, token)};
}

// Absent tables have every id.
EF_DEVICE bool has(const Lookup& lookup, int64_t id) {
    return lookup.table.data == nullptr || (id >= 0 && id < lookup.table_rows);
}

EF_DEVICE bool has_all(const EmbedLayerNormArguments& p, const Ids& ids) {
    return has(p.word, ids.word) && has(p.token_type, ids.token_type) &&
           has(p.position, ids.position);
}

template <class T>
EF_DEVICE const void* row_of(const Lookup& lookup, int64_t id, bool known) {
    if (!known || lookup.table.data == nullptr) return nullptr;
    return static_cast<const T*>(lookup.table.data) + id * lookup.table.stride;
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kBlockThreads, Traits::kBlocksPerMultiprocessor)
    embed_layer_norm_kernel(EmbedLayerNormArguments p) {
    using T = typename Traits::T;
    const int64_t step = int64_t{gridDim.x} * Traits::kRows;
    const int row_in_block = static_cast<int>(threadIdx.x) / Traits::kThreads;
    const float inverse_width = 1.0f / static_cast<float>(p.width);
    int64_t token = int64_t{blockIdx.x} * Traits::kRows + row_in_block;

    Ids ids = load_ids(p, token);
    Ids next_ids = load_ids(p, token + step);
    RawRow<Traits> word;
    load_row<Traits>(word, row_of<T>(p.word, ids.word, has_all(p, ids)), p.width);
    // All threads of the block go on until its first token is beyond the last: they reduce together.
    for (; token - row_in_block < p.tokens; token += step) {
        const bool known = has_all(p, ids);
        RawRow<Traits> other;
        float values[Traits::kElements] = {};
        add_row<Traits>(values, word);
        load_row<Traits>(other, row_of<T>(p.token_type, ids.token_type, known), p.width);
        add_row<Traits>(values, other);
        load_row<Traits>(other, row_of<T>(p.position, ids.position, known), p.width);
        add_row<Traits>(values, other);

        ids = next_ids;
        load_row<Traits>(word, row_of<T>(p.word, ids.word, has_all(p, ids)), p.width);
        next_ids = load_ids(p, token + 2 * step);

        Affine y = centre<Traits>(values, p.width, inverse_width, p.eps);
        if (!known) y.shift = NAN;
#pragma unroll
        for (float& value : values) value = fmaf(value, y.scale, y.shift);
        with_elements<Traits>(p.weight, p.width, [&](int i, float w) { values[i] *= w; });
        with_elements<Traits>(p.bias, p.width, [&](int i, float b) { values[i] += b; });
        if (token < p.tokens) {
            store_row<Traits>(static_cast<T*>(p.out) + token * p.width, values, p.width);
        }
    }
}

}  // namespace

void embed_layer_norm(const EmbedLayerNormArguments& arguments, const Place& place) {
    if (arguments.tokens == 0) return;
    const DeviceScope scope(place.device);
    with_type(arguments.dtype, [&](auto element) {
        using T = decltype(element);
        const EmbedLayerNormArguments& a = arguments;
        const bool aligned = is_aligned<T>(a.word.table) && is_aligned<T>(a.token_type.table) &&
                             is_aligned<T>(a.position.table) && is_aligned(a.out) &&
                             is_aligned(a.weight.data) && is_aligned(a.bias.data);
        with_row_traits<T>(aligned, a.width, [&](auto traits) {
            using Traits = decltype(traits);
            launch(embed_layer_norm_kernel<Traits>, row_launch<Traits>(a.tokens), a,
                   static_cast<Stream>(place.stream),
                   "embed_layer_norm of (" + std::to_string(a.tokens) + ", " +
                       std::to_string(a.width) + ")");
        });
    });
}

}  // namespace encoder_fast
