#include "attention/launcher.cuh"

namespace encoder_fast {

void attention_heads_of_32(const AttentionArguments& arguments, Stream stream) {
    attention_of<32>(arguments, stream);
}

}  // namespace encoder_fast
