// What Python calls: pointers, sizes and strides as plain integers, a vector's or ids' absence as a
// null pointer. Nothing is checked here; encoder_fast/backends/cuda.py does that.
//
// Compiled over the emulation, with ENCODER_FAST_HOST, the module is called _cuda_host and has what
// bind_emulation.h adds besides.

#include <pybind11/pybind11.h>

#include "add_layer_norm.h"
#include "attention.h"
#include "bias_gelu.h"
#include "disentangled_attention.h"
#include "embed_layer_norm.h"

#ifdef ENCODER_FAST_HOST
#include "bind_emulation.h"
#define MODULE_NAME _cuda_host
#else
#define MODULE_NAME _cuda
#endif

namespace encoder_fast {
namespace {

using Address = uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

Rows rows(Address address, int64_t stride) { return {pointer(address), stride}; }

Vector vector(Address address, int dtype) {
    return {pointer(address), static_cast<DType>(dtype)};
}

void bind_add_layer_norm(Address x, int64_t x_stride, Address residual, int64_t residual_stride,
                         Address x_bias, int x_bias_dtype, Address weight, int weight_dtype,
                         Address bias, int bias_dtype, Address out, Address sum, int64_t n_rows,
                         int width, float eps, int dtype, int device, Address stream) {
    add_layer_norm(
        {rows(x, x_stride), rows(residual, residual_stride), vector(x_bias, x_bias_dtype),
         vector(weight, weight_dtype), vector(bias, bias_dtype), pointer(out), pointer(sum), n_rows,
         width, eps, static_cast<DType>(dtype)},
        {device, pointer(stream)});
}

Lookup lookup(Address table, int64_t stride, int64_t table_rows, Address ids, bool ids_are_int64) {
    return {rows(table, stride), table_rows, pointer(ids), ids_are_int64};
}

void bind_embed_layer_norm(Address word, int64_t word_stride, int64_t word_rows, Address word_ids,
                           bool word_ids_are_int64, Address token_type, int64_t token_type_stride,
                           int64_t token_type_rows, Address token_type_ids,
                           bool token_type_ids_are_int64, Address position, int64_t position_stride,
                           int64_t position_rows, Address position_ids,
                           bool position_ids_are_int64, Address weight, int weight_dtype,
                           Address bias, int bias_dtype, Address out, int64_t tokens, int width,
                           float eps, int dtype, int device, Address stream) {
    embed_layer_norm(
        {lookup(word, word_stride, word_rows, word_ids, word_ids_are_int64),
         lookup(token_type, token_type_stride, token_type_rows, token_type_ids,
                token_type_ids_are_int64),
         lookup(position, position_stride, position_rows, position_ids, position_ids_are_int64),
         vector(weight, weight_dtype), vector(bias, bias_dtype), pointer(out), tokens, width, eps,
         static_cast<DType>(dtype)},
        {device, pointer(stream)});
}

void bind_bias_gelu(Address x, int64_t x_stride, Address bias, int bias_dtype, Address out,
                    int64_t n_rows, int width, int dtype, int device, Address stream) {
    bias_gelu({rows(x, x_stride), vector(bias, bias_dtype), pointer(out), n_rows, width,
               static_cast<DType>(dtype)},
              {device, pointer(stream)});
}

// (total, heads, head_dim), or a table's rows in place of the tokens.
Heads heads_of(Address address, int64_t row, int64_t head) { return {pointer(address), row, head}; }

AttentionArguments attention_arguments(const Heads& q, const Heads& k, const Heads& v, Address out,
                                       Address cu_seqlens, Address workspace, int total, int batch,
                                       int heads, int head_dim, int max_seqlen,
                                       float softmax_scale, int dtype) {
    return {q,
            k,
            v,
            pointer(out),
            static_cast<const int32_t*>(pointer(cu_seqlens)),
            pointer(workspace),
            total,
            batch,
            heads,
            head_dim,
            max_seqlen,
            softmax_scale,
            static_cast<DType>(dtype)};
}

void bind_attention(Address q, int64_t q_row, int64_t q_head, Address k, int64_t k_row,
                    int64_t k_head, Address v, int64_t v_row, int64_t v_head, Address out,
                    Address cu_seqlens, Address workspace, int total, int batch, int heads,
                    int head_dim, int max_seqlen, float softmax_scale, int dtype, int device,
                    Address stream) {
    attention(attention_arguments(heads_of(q, q_row, q_head), heads_of(k, k_row, k_head),
                                  heads_of(v, v_row, v_head), out, cu_seqlens, workspace, total,
                                  batch, heads, head_dim, max_seqlen, softmax_scale, dtype),
              {device, pointer(stream)});
}

void bind_disentangled_attention(Address q, int64_t q_row, int64_t q_head, Address k,
                                 int64_t k_row, int64_t k_head, Address v, int64_t v_row,
                                 int64_t v_head, Address pos_key, int64_t pos_key_row,
                                 int64_t pos_key_head, Address pos_query, int64_t pos_query_row,
                                 int64_t pos_query_head, Address row_of_distance, int reach,
                                 Address out, Address cu_seqlens, Address workspace, int total,
                                 int batch, int heads, int head_dim, int max_seqlen,
                                 float softmax_scale, int dtype, int device, Address stream) {
    disentangled_attention(
        {attention_arguments(heads_of(q, q_row, q_head), heads_of(k, k_row, k_head),
                             heads_of(v, v_row, v_head), out, cu_seqlens, workspace, total, batch,
                             heads, head_dim, max_seqlen, softmax_scale, dtype),
         heads_of(pos_key, pos_key_row, pos_key_head),
         heads_of(pos_query, pos_query_row, pos_query_head),
         static_cast<const int32_t*>(pointer(row_of_distance)), reach},
        {device, pointer(stream)});
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
    m.def("add_layer_norm", bind_add_layer_norm);
    m.def("embed_layer_norm", bind_embed_layer_norm);
    m.def("bias_gelu", bind_bias_gelu);
    m.def("attention", bind_attention);
    m.def("disentangled_attention", bind_disentangled_attention);
    m.def("attention_workspace_bytes", attention_workspace_bytes);
#ifdef ENCODER_FAST_HOST
    emulation::bind(m);
#endif
}

}  // namespace encoder_fast
