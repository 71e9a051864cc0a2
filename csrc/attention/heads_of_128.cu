#include "attention/launcher.cuh"

namespace encoder_fast {

void attention_heads_of_128(const AttentionArguments& arguments, Stream stream) {
    attention_of<128>(arguments, stream);
}

}  // namespace encoder_fast
