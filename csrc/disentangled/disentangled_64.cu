#include "disentangled/launcher.cuh"

namespace encoder_fast {

void disentangled_attention_64(const DisentangledArguments& arguments, Stream stream) {
    disentangled_attention_of<64>(arguments, stream);
}

}  // namespace encoder_fast
