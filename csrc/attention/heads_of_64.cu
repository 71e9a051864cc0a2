#include "attention/launcher.cuh"

namespace encoder_fast {

void attention_heads_of_64(const AttentionArguments& arguments, Stream stream) {
    attention_of<64>(arguments, stream);
}

}  // namespace encoder_fast
