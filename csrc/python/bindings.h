#pragma once

#include <pybind11/pybind11.h>

namespace moetuner::python {

void bind_price(pybind11::module_& module);
void bind_statistics(pybind11::module_& module);
void bind_tally(pybind11::module_& module);
void bind_balance(pybind11::module_& module);
void bind_arcs(pybind11::module_& module);
void bind_search(pybind11::module_& module);

}  // namespace moetuner::python
