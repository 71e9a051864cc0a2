// What tests may say to the emulation that is compiled into an extension module.

#pragma once

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>

#include "emulation.h"

namespace emulation {

inline void bind(pybind11::module_& m) {
    pybind11::register_local_exception<Error>(m, "EmulationError", PyExc_RuntimeError);
    m.def("allow", allow);
    m.def("forbid_all", forbid_all);
    m.def("interleave", interleave);
    m.def("run_in_order", run_in_order);
    m.def("observe_launches", observe_launches);
}

}  // namespace emulation
