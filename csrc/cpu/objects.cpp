#include "cpu/objects.h"

#include <cstdint>
#include <cstring>

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

// What places_of writes of a tensor, ahead of sizes and strides. Compared byte by byte: no padding.
struct Place {
    PyObject* type;
    char* data;
    int32_t device_type, device_id;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int32_t dims;
};
static_assert(sizeof(Place) == 2 * sizeof(void*) + 16);

// Where what is found goes: into a string, or beside what was found before.
class Writer {
public:
    explicit Writer(std::string& bytes) : bytes_(bytes) {}
    bool put(const void* first, size_t size) {
        bytes_.append(static_cast<const char*>(first), size);
        return true;
    }

private:
    std::string& bytes_;
};

class Comparer {
public:
    explicit Comparer(std::string_view known) : known_(known) {}
    bool put(const void* first, size_t size) {
        if (known_.size() < size || std::memcmp(known_.data(), first, size) != 0) return false;
        known_.remove_prefix(size);
        return true;
    }
    bool is_at_end() const { return known_.empty(); }

private:
    std::string_view known_;
};

template <typename Sink, typename T>
bool put(Sink& sink, const T* first, int64_t count = 1) {
    // Sizes of a tensor without dimensions may be a null pointer.
    if (count == 0) return true;
    return sink.put(first, count * sizeof(T));
}

// What `find` puts into a sink; empty if it gave up.
template <typename Find>
std::string written(Find find) {
    std::string bytes;
    Writer writer(bytes);
    if (!find(writer)) bytes.clear();
    PyErr_Clear();
    return bytes;
}

// Whether `find` would write just this.
template <typename Find>
bool equals(std::string_view known, Find find) {
    Comparer comparer(known);
    const bool is_equal = find(comparer) && comparer.is_at_end();
    PyErr_Clear();
    return is_equal;
}

#ifdef ENCODER_FAST_DICT_NUMBERS
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
template <typename Sink>
bool put_number(Sink& sink, PyObject* dict) {
    return put(sink, &reinterpret_cast<PyDictObject*>(dict)->ma_version_tag);
}
#pragma GCC diagnostic pop

template <typename Sink>
bool find_numbers(Sink& sink, PyObject* objects, PyObject* dicts, PyObject* owner) {
    const Py_ssize_t object_count = PyList_GET_SIZE(objects);
    for (Py_ssize_t i = 0; i <= object_count; ++i) {
        PyObject* object = i < object_count ? PyList_GET_ITEM(objects, i) : owner;
        PyObject* dict = PyObject_GenericGetDict(object, nullptr);
        if (dict == nullptr) return false;
        const void* const identity[] = {Py_TYPE(object), dict};
        const bool goes_on =
            PyDict_Check(dict) && put(sink, identity, 2) && put_number(sink, dict);
        Py_DECREF(dict);
        if (!goes_on) return false;
    }
    const Py_ssize_t dict_count = PyList_GET_SIZE(dicts);
    for (Py_ssize_t i = 0; i < dict_count; ++i) {
        if (!put_number(sink, PyList_GET_ITEM(dicts, i))) return false;
    }
    return true;
}
#endif

template <typename Sink>
bool find_places(Sink& sink, PyObject* tensors, PyObject* capsule, PyObject* type,
                 PyObject* other_type) {
    const auto* api =
        static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (api == nullptr || api->major != kMajor || api->view_object == nullptr) return false;
    const Py_ssize_t count = PyList_GET_SIZE(tensors);
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* tensor = PyList_GET_ITEM(tensors, i);
        PyObject* its_type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
        if (tensor == Py_None) {
            if (!put(sink, &its_type)) return false;
            continue;
        }
        TensorView view{};
        // Of another type, a tensor need not have memory at all.
        if ((its_type != type && its_type != other_type) || api->view_object(tensor, &view) != 0) {
            return false;
        }
        const Place place{its_type, static_cast<char*>(view.data) + view.byte_offset,
                          view.device_type, view.device_id, view.type_code, view.type_bits,
                          view.type_lanes, view.dims};
        if (!put(sink, &place) || !put(sink, view.sizes, view.dims) ||
            !put(sink, view.strides, view.dims)) {
            return false;
        }
    }
    return true;
}

template <typename Sink>
bool find_versions(Sink& sink, PyObject* tensors, PyObject* descriptor) {
    const descrgetfunc read = Py_TYPE(descriptor)->tp_descr_get;
    if (read == nullptr) return false;
    const Py_ssize_t count = PyList_GET_SIZE(tensors);
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* tensor = PyList_GET_ITEM(tensors, i);
        int64_t version = -1;
        if (tensor != Py_None) {
            PyObject* number = read(descriptor, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
            version = number == nullptr ? -1 : PyLong_AsLongLong(number);
            Py_XDECREF(number);
            if (version < 0) return false;
        }
        if (!put(sink, &version)) return false;
    }
    return true;
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

#ifdef ENCODER_FAST_DICT_NUMBERS
std::string numbers_of(PyObject* objects, PyObject* dicts, PyObject* owner) {
    return written([&](auto& sink) { return find_numbers(sink, objects, dicts, owner); });
}

bool have_numbers(PyObject* objects, PyObject* dicts, PyObject* owner, std::string_view known) {
    return equals(known, [&](auto& sink) { return find_numbers(sink, objects, dicts, owner); });
}
#endif

std::string places_of(PyObject* tensors, PyObject* api, PyObject* type, PyObject* other_type) {
    return written([&](auto& sink) { return find_places(sink, tensors, api, type, other_type); });
}

bool have_places(PyObject* tensors, PyObject* api, PyObject* type, PyObject* other_type,
                 std::string_view known) {
    return equals(known,
                  [&](auto& sink) { return find_places(sink, tensors, api, type, other_type); });
}

std::string versions_of(PyObject* tensors, PyObject* descriptor) {
    return written([&](auto& sink) { return find_versions(sink, tensors, descriptor); });
}

bool have_versions(PyObject* tensors, PyObject* descriptor, std::string_view known) {
    return equals(known, [&](auto& sink) { return find_versions(sink, tensors, descriptor); });
}

}  // namespace encoder_fast::cpu
