// The table of kernels of the including file's instruction set; it names itself by KERNELS.

#include "cpu/add_layer_norm_rows.h"
#include "cpu/attention_task.h"
#include "cpu/kernels.h"

namespace encoder_fast::cpu {
namespace {

#if defined(__AVX512BF16__)
using BFloat16Product = ByPairs;
#else
using BFloat16Product = ByFloats<BFloat16>;
#endif

void attend(const AttentionArguments& arguments, const AttentionTask& task, float* workspace) {
    switch (arguments.dtype) {
        case DType::kFloat32: Task<ByFloats<Float32>>(arguments, task, workspace).run(); break;
        case DType::kFloat16: Task<ByFloats<Float16>>(arguments, task, workspace).run(); break;
        case DType::kBFloat16: Task<BFloat16Product>(arguments, task, workspace).run(); break;
    }
}

void add_layer_norm_of(const AddLayerNormArguments& arguments, int64_t first, int64_t last) {
    switch (arguments.dtype) {
        case DType::kFloat32: add_layer_norm_rows<Float32>(arguments, first, last); break;
        case DType::kFloat16: add_layer_norm_rows<Float16>(arguments, first, last); break;
        case DType::kBFloat16: add_layer_norm_rows<BFloat16>(arguments, first, last); break;
    }
}

}  // namespace

const Kernels KERNELS = {attend, add_layer_norm_of};

}  // namespace encoder_fast::cpu
