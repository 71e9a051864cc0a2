// What Python objects hold, read without a call of Python's for each. A forward asks this of every
// module and weight of a model.

#pragma once

#include <Python.h>

#include <string>
#include <string_view>

namespace encoder_fast::cpu {

// Whether modules are as they were read, and nothing on them wants to run. Each edge is a tuple: the
// parent's dictionary of children, a name in it, the child, its class, its own dictionary of
// children and how many those are. In eval mode, no hook of a forward, no forward of its own.
bool are_quiet(PyObject* edges);

// What follows comes in pairs: `…_of` gives bytes that are for comparisons alone, empty where they
// can't be told; `have_…` says whether it would give the known ones again.

#if !defined(PYPY_VERSION) && PY_VERSION_HEX < 0x030D0000
// CPython before 3.13 gives a dictionary a new number at every change (PEP 509).
#define ENCODER_FAST_DICT_NUMBERS
// Of each object, and of `owner` at last: type, dictionary, and the dictionary's number; and the
// numbers of further dictionaries. None if an object has no dictionary.
std::string numbers_of(PyObject* objects, PyObject* dicts, PyObject* owner);
bool have_numbers(PyObject* objects, PyObject* dicts, PyObject* owner, std::string_view known);
#endif

// Where each tensor of a list lies and in what form: type, address, device, dtype, sizes, strides.
// None if one is of neither type or can't say. `api` is the capsule of DLPack's exchange of tensors
// in C, `None` stands for no tensor.
std::string places_of(PyObject* tensors, PyObject* api, PyObject* type, PyObject* other_type);
bool have_places(PyObject* tensors, PyObject* api, PyObject* type, PyObject* other_type,
                 std::string_view known);

// How often each tensor was written, by `descriptor`, which reads a tensor's counter. None if one
// has none; `None` stands for no tensor.
std::string versions_of(PyObject* tensors, PyObject* descriptor);
bool have_versions(PyObject* tensors, PyObject* descriptor, std::string_view known);

}  // namespace encoder_fast::cpu
