#include "disentangled/launcher.cuh"

namespace encoder_fast {

void disentangled_attention_32(const DisentangledArguments& arguments, Stream stream) {
    disentangled_attention_of<32>(arguments, stream);
}

}  // namespace encoder_fast
