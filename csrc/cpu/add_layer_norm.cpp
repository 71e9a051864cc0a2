#include "cpu/add_layer_norm.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace encoder_fast::cpu {

// A share of at most so many elements, a second cache's worth.
constexpr int64_t kShare = 64 << 10;

void add_layer_norm(const AddLayerNormArguments& args, int isa, int threads) {
    const int64_t rows = std::max<int64_t>(1, kShare / args.width);
    const Kernels& kernels = kernels_of(isa);
    parallel_for((args.rows + rows - 1) / rows, threads, [&](int64_t share, int) {
        kernels.add_layer_norm(args, share * rows, std::min(args.rows, (share + 1) * rows));
    });
}

}  // namespace encoder_fast::cpu
