#pragma once

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace moetuner::python {

/// A C-contiguous array of exactly this dtype; bound with `.noconvert()`, so nothing is copied.
template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

template <typename T>
Array<T> zeros(std::initializer_list<std::int64_t> shape) {
  Array<T> array(std::vector<pybind11::ssize_t>(shape.begin(), shape.end()));
  std::fill_n(array.mutable_data(), array.size(), T{0});
  return array;
}

inline std::string shape_of(const pybind11::array& array) {
  std::string text = "[";
  for (pybind11::ssize_t i = 0; i < array.ndim(); ++i) {
    text += (i ? ", " : "") + std::to_string(array.shape(i));
  }
  return text + "]";
}

/// Throws std::invalid_argument unless `array` has `ndim` dimensions.
inline void check_rank(const char* where, const pybind11::array& array, int ndim) {
  if (array.ndim() != ndim) {
    throw std::invalid_argument(std::string(where) + " must have " + std::to_string(ndim) +
                                " dimensions, got " + shape_of(array));
  }
}

inline void check(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace moetuner::python
