#pragma once

#include "moetuner/search.h"
#include "numpy_arrays.h"

#include <string>

namespace moetuner::python {

/// `SearchWeights` in the order of its fields.
inline SearchWeights weights_of(const std::string& where, const Array<double>& weights) {
  check(weights.ndim() == 1 && weights.shape(0) == 11,
        where + ": weights must be [11], got " + shape_of(weights));
  const double* w = weights.data();
  return {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10]};
}

inline void check_ranks(const std::string& where, std::int64_t ranks, std::int64_t per_node) {
  check(ranks >= 1 && per_node >= 1 && ranks % per_node == 0,
        where + ": ranks_per_node must divide num_ranks, got " + std::to_string(per_node) +
            " and " + std::to_string(ranks));
}

inline void check_scenarios(const std::string& where,
                            const Array<std::int64_t>& begin,
                            std::int64_t num_tokens) {
  check(begin.ndim() == 1 && begin.size() >= 2,
        where + ": scenario_begin must be [scenarios + 1], got " + shape_of(begin));
  const pybind11::ssize_t last = begin.size() - 1;
  check(begin.data()[0] == 0 && begin.data()[last] == num_tokens,
        where + ": scenario_begin must run from 0 to the number of tokens");
  for (pybind11::ssize_t s = 0; s < last; ++s) {
    check(begin.data()[s] <= begin.data()[s + 1], where + ": scenario_begin must not fall");
  }
}

}  // namespace moetuner::python
