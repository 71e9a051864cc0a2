// The entry: a source file for each head size, so that they compile side by side.

#include "attention.h"

#include "attention/launcher.cuh"

namespace encoder_fast {

size_t attention_workspace_bytes(int total, int batch, int max_seqlen) {
    // A shorter sequence is one tile, which needs no list.
    if (max_seqlen <= kLeastTileRows) return 0;
    return list_entries(total, batch) * kListEntryBytes;
}

void attention(const AttentionArguments& arguments, const Place& place) {
    if (arguments.total == 0 || arguments.heads == 0) return;
    const DeviceScope scope(place.device);
    const Stream stream = static_cast<Stream>(place.stream);
    switch (arguments.head_dim) {
        case 32:
            return attention_heads_of_32(arguments, stream);
        case 64:
            return attention_heads_of_64(arguments, stream);
        case 128:
            return attention_heads_of_128(arguments, stream);
        default:
            throw std::invalid_argument("head_dim must be 32, 64 or 128, got " +
                                        std::to_string(arguments.head_dim));
    }
}

}  // namespace encoder_fast
