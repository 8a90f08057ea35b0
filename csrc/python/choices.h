#pragma once

#include "moetuner/planning/replica_rule.h"
#include "moetuner/planning/wire.h"

#include <pybind11/pybind11.h>

#include <string>

// Members of Python's `Wire`, `Homes` and `ReplicaRule`, which are strings, become those of C++
// here.

namespace pybind11::detail {

template <typename Choice>
bool load_choice(handle source, Choice& value) {
  if (!PyUnicode_Check(source.ptr())) return false;
  value = moetuner::named<Choice>(source.cast<std::string>());
  return true;
}

template <>
struct type_caster<moetuner::Wire> {
  PYBIND11_TYPE_CASTER(moetuner::Wire, const_name("moetuner.evaluation.cost.Wire"));
  bool load(handle source, bool) { return load_choice(source, value); }
};

template <>
struct type_caster<moetuner::Homes> {
  PYBIND11_TYPE_CASTER(moetuner::Homes, const_name("moetuner.evaluation.cost.Homes"));
  bool load(handle source, bool) { return load_choice(source, value); }
};

template <>
struct type_caster<moetuner::ReplicaRule> {
  PYBIND11_TYPE_CASTER(moetuner::ReplicaRule,
                       const_name("moetuner.evaluation.replica_rule.ReplicaRule"));
  bool load(handle source, bool) { return load_choice(source, value); }
};

}  // namespace pybind11::detail
