// The entry: a source file for each head size, so that they compile side by side.

#include "disentangled_attention.h"

#include <stdexcept>

#include "disentangled/launcher.cuh"

namespace encoder_fast {

void disentangled_attention(const DisentangledArguments& arguments, const Place& place) {
    if (arguments.total == 0 || arguments.heads == 0) return;
    const DeviceScope scope(place.device);
    const Stream stream = static_cast<Stream>(place.stream);
    switch (arguments.head_dim) {
        case 32:
            return disentangled_attention_32(arguments, stream);
        case 64:
            return disentangled_attention_64(arguments, stream);
        default:
            throw std::invalid_argument("head_dim must be 32 or 64, got " +
                                        std::to_string(arguments.head_dim));
    }
}

}  // namespace encoder_fast
