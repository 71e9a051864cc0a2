// What Python calls: pointers, sizes and strides as plain integers, absence as a null pointer.
// Nothing is checked here, but by attention what cu_seqlens holds; cpu_kernels.py does the rest.

#include <pybind11/pybind11.h>

#include <string_view>

#include "cpu/add_layer_norm.h"
#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/objects.h"
#include "cpu/same_bytes.h"

namespace encoder_fast::cpu {
namespace {

using Address = uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

bool bind_attention(Address q, int64_t q_row, int64_t q_head, Address k, int64_t k_row,
                    int64_t k_head, Address v, int64_t v_row, int64_t v_head, Address out,
                    Address cu_seqlens, int total, int batch, int max_seqlen, int heads,
                    int head_size, float softmax_scale, int window, Address bias,
                    int64_t bias_stride, Address workspace, int dtype, int isa, int threads) {
    pybind11::gil_scoped_release released;
    return attention({{pointer(q), q_row, q_head},
               {pointer(k), k_row, k_head},
               {pointer(v), v_row, v_head},
               pointer(out),
               static_cast<const int32_t*>(pointer(cu_seqlens)),
               total,
               batch,
               max_seqlen,
               heads,
               head_size,
               softmax_scale,
               window,
               static_cast<const float*>(pointer(bias)),
               bias_stride,
               static_cast<DType>(dtype),
               static_cast<float*>(pointer(workspace))},
              isa, threads);
}

void bind_add_layer_norm(Address x, Address residual, Address x_bias, Address weight, Address bias,
                         Address out, Address sum, int64_t rows, int width, float eps, int dtype,
                         int isa, int threads) {
    pybind11::gil_scoped_release released;
    add_layer_norm({pointer(x), pointer(residual), pointer(x_bias), pointer(weight), pointer(bias),
                    pointer(out), pointer(sum), rows, width, eps, static_cast<DType>(dtype)},
                   isa, threads);
}

bool bind_same_bytes(Address runs, int64_t count, Address expected) {
    return same_bytes(static_cast<const Run*>(pointer(runs)), count, pointer(expected));
}

void bind_looks(pybind11::module_& m) {
    using List = pybind11::list;
    using Object = pybind11::object;
    using Known = std::string_view;
    m.def("are_quiet", [](List edges) { return are_quiet(edges.ptr()); });
#ifdef ENCODER_FAST_DICT_NUMBERS
    m.def("numbers_of", [](List objects, List dicts, Object owner) {
        return pybind11::bytes(numbers_of(objects.ptr(), dicts.ptr(), owner.ptr()));
    });
    m.def("have_numbers", [](List objects, List dicts, Object owner, Known known) {
        return have_numbers(objects.ptr(), dicts.ptr(), owner.ptr(), known);
    });
#endif
    m.def("places_of", [](List tensors, Object api, Object type, Object other_type) {
        return pybind11::bytes(
            places_of(tensors.ptr(), api.ptr(), type.ptr(), other_type.ptr()));
    });
    m.def("have_places", [](List tensors, Object api, Object type, Object other_type, Known known) {
        return have_places(tensors.ptr(), api.ptr(), type.ptr(), other_type.ptr(), known);
    });
    m.def("versions_of", [](List tensors, Object descriptor) {
        return pybind11::bytes(versions_of(tensors.ptr(), descriptor.ptr()));
    });
    m.def("have_versions", [](List tensors, Object descriptor, Known known) {
        return have_versions(tensors.ptr(), descriptor.ptr(), known);
    });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.def("attention", bind_attention);
    m.def("attention_workspace", attention_workspace);
    m.def("add_layer_norm", bind_add_layer_norm);
    m.def("same_bytes", bind_same_bytes);
    bind_looks(m);
    m.def("best_isa", [] { return static_cast<int>(best_isa()); });
    // To be changed with what any of these takes or gives; cpu_kernels.py knows it too.
    m.attr("INTERFACE") = 4;
    m.attr("BIAS_BEYOND") = kBiasBeyond;
    m.attr("MAX_WIDTH") = kMostWidth;
}

}  // namespace encoder_fast::cpu
