#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <thread>

namespace moetuner::python {

/// For long work without the interpreter: run Python's signal handlers on the thread that began it,
/// so that Ctrl-C ends the work by the exception that its handler raises.
inline std::function<void()> hearing_signals() {
  return [caller = std::this_thread::get_id()] {
    if (std::this_thread::get_id() != caller) return;
    const pybind11::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
  };
}

}  // namespace moetuner::python
