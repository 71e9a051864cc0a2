// What Python objects hold, read without a call of Python's for each. A forward asks this of every
// module and weight of a model.

#pragma once

#include <Python.h>

#include <string>

namespace encoder_fast::cpu {

// Whether modules are as they were read, and nothing on them wants to run. Each edge is a tuple: the
// parent's dictionary of children, a name in it, the child, its class, its own dictionary of
// children and how many those are. In eval mode, no hook of a forward, no forward of its own.
bool are_quiet(PyObject* edges);

// Where each tensor of a list lies and in what form: type, address, device, dtype, sizes, strides.
// For comparisons alone. Empty if one is of neither type or can't say. `api` is the capsule of
// DLPack's exchange of tensors in C, `None` stands for no tensor.
std::string places_of(PyObject* tensors, PyObject* api, PyObject* type, PyObject* other_type);

// How often each tensor was written, by `descriptor`, which reads a tensor's counter. Empty if one
// has none; `None` stands for no tensor.
std::string versions_of(PyObject* tensors, PyObject* descriptor);

}  // namespace encoder_fast::cpu
