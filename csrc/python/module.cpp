// moetuner._core: the planning core over NumPy arrays. The GIL is released while it computes, and
// std::invalid_argument reaches Python as ValueError.

#include "bindings.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "Planning core of moetuner (C++).";
  moetuner::python::bind_price(module);
  moetuner::python::bind_statistics(module);
  moetuner::python::bind_tally(module);
  moetuner::python::bind_balance(module);
  moetuner::python::bind_arcs(module);
  moetuner::python::bind_search(module);
}
