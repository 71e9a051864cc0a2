#include "cpu/objects.h"

#include <cstdint>

namespace encoder_fast::cpu {
namespace {

// DLPack's binary interface, version 1: https://dmlc.github.io/dlpack/latest/c_api.html
struct TensorView {
    void* data;
    int32_t device_type;
    int32_t device_id;
    int32_t dims;
    uint8_t type_code;
    uint8_t type_bits;
    uint16_t type_lanes;
    int64_t* sizes;
    int64_t* strides;
    uint64_t byte_offset;
};

struct ExchangeApi {
    uint32_t major;
    uint32_t minor;
    void* previous;
    void* allocate;
    void* from_object;
    void* to_object;
    int (*view_object)(void* object, TensorView* view);
    void* current_stream;
};

constexpr uint32_t kMajor = 1;

template <typename T>
void append(std::string& bytes, const T* first, int64_t count = 1) {
    bytes.append(reinterpret_cast<const char*>(first), count * sizeof(T));
}

bool is_empty(PyObject* dict) {
    return dict != nullptr && PyDict_Check(dict) && PyDict_Size(dict) == 0;
}

}  // namespace

bool are_quiet(PyObject* edges) {
    static PyObject* const training = PyUnicode_InternFromString("training");
    static PyObject* const hooks = PyUnicode_InternFromString("_forward_hooks");
    static PyObject* const pre_hooks = PyUnicode_InternFromString("_forward_pre_hooks");
    static PyObject* const forward = PyUnicode_InternFromString("forward");
    const Py_ssize_t count = PyList_GET_SIZE(edges);
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* edge = PyList_GET_ITEM(edges, i);
        PyObject* child = PyTuple_GET_ITEM(edge, 2);
        const Py_ssize_t children = PyLong_AsSsize_t(PyTuple_GET_ITEM(edge, 5));
        if (PyDict_GetItemWithError(PyTuple_GET_ITEM(edge, 0), PyTuple_GET_ITEM(edge, 1)) != child ||
            reinterpret_cast<PyObject*>(Py_TYPE(child)) != PyTuple_GET_ITEM(edge, 3) ||
            PyDict_Size(PyTuple_GET_ITEM(edge, 4)) != children) {
            PyErr_Clear();
            return false;
        }
        PyObject* state = PyObject_GenericGetDict(child, nullptr);
        const bool quiet = state != nullptr &&
                           PyDict_GetItemWithError(state, training) == Py_False &&
                           is_empty(PyDict_GetItemWithError(state, hooks)) &&
                           is_empty(PyDict_GetItemWithError(state, pre_hooks)) &&
                           PyDict_GetItemWithError(state, forward) == nullptr;
        Py_XDECREF(state);
        if (!quiet) {
            PyErr_Clear();
            return false;
        }
    }
    return true;
}

std::string places_of(PyObject* tensors, PyObject* capsule, PyObject* type, PyObject* other_type) {
    const auto* api =
        static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (api == nullptr || api->major != kMajor || api->view_object == nullptr) {
        PyErr_Clear();
        return {};
    }
    std::string bytes;
    const Py_ssize_t count = PyList_GET_SIZE(tensors);
    bytes.reserve(count * (sizeof(void*) + sizeof(TensorView) + 4 * sizeof(int64_t)));
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* tensor = PyList_GET_ITEM(tensors, i);
        PyObject* its_type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
        append(bytes, &its_type);
        if (tensor == Py_None) continue;
        TensorView view{};
        // Of another type, a tensor need not have memory at all.
        if ((its_type != type && its_type != other_type) || api->view_object(tensor, &view) != 0) {
            PyErr_Clear();
            return {};
        }
        append(bytes, &view.data);
        append(bytes, &view.byte_offset);
        append(bytes, &view.device_type);
        append(bytes, &view.device_id);
        append(bytes, &view.dims);
        append(bytes, &view.type_code);
        append(bytes, &view.type_bits);
        append(bytes, view.sizes, view.dims);
        append(bytes, view.strides, view.dims);
    }
    return bytes;
}

std::string versions_of(PyObject* tensors, PyObject* descriptor) {
    const descrgetfunc read = Py_TYPE(descriptor)->tp_descr_get;
    if (read == nullptr) return {};
    std::string bytes;
    const Py_ssize_t count = PyList_GET_SIZE(tensors);
    bytes.reserve(count * sizeof(int64_t));
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* tensor = PyList_GET_ITEM(tensors, i);
        int64_t version = -1;
        if (tensor != Py_None) {
            PyObject* number = read(descriptor, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
            version = number == nullptr ? -1 : PyLong_AsLongLong(number);
            Py_XDECREF(number);
            if (version < 0) {
                PyErr_Clear();
                return {};
            }
        }
        append(bytes, &version);
    }
    return bytes;
}

}  // namespace encoder_fast::cpu
