#pragma once

#include "moetuner/planning/search_task.h"
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

/// The arrays of a task, checked, and the sizes that they tell.
struct TaskArrays {
  const Array<std::int16_t>& topk_ids;
  const Array<std::int64_t>& scenario_begin;
  const Array<double>& row_scale;
  const Array<double>& weight;
  const Array<double>& rank_speed;
  const Array<double>& weights;
  const Array<std::int32_t>& stop;
};

template <typename T>
void check_vector(const std::string& where,
                  const char* name,
                  const Array<T>& array,
                  std::int64_t size) {
  check(array.ndim() == 1 && array.shape(0) == size,
        where + ": " + name + " must be [" + std::to_string(size) + "], got " + shape_of(array));
}

inline void fill_task(SearchTask& task,
                      const std::string& where,
                      const TaskArrays& arrays,
                      std::int64_t ranks_per_node) {
  check_rank((where + ": topk_ids").c_str(), arrays.topk_ids, 3);
  task.topk_ids = arrays.topk_ids.data();
  task.num_tokens = arrays.topk_ids.shape(0);
  task.num_layers = arrays.topk_ids.shape(1);
  task.top_k = arrays.topk_ids.shape(2);
  check_scenarios(where, arrays.scenario_begin, task.num_tokens);
  task.scenario_begin = arrays.scenario_begin.data();
  task.num_scenarios = arrays.scenario_begin.size() - 1;
  check_vector(where, "row_scale", arrays.row_scale, task.num_scenarios);
  check_vector(where, "weight", arrays.weight, task.num_scenarios);
  check_vector(where, "rank_speed", arrays.rank_speed, arrays.rank_speed.size());
  check_vector(where, "stop", arrays.stop, 1);
  task.row_scale = arrays.row_scale.data();
  task.weight = arrays.weight.data();
  task.rank_speed = arrays.rank_speed.data();
  task.weights = weights_of(where, arrays.weights);
  task.stop = arrays.stop.data();
  task.num_ranks = arrays.rank_speed.size();
  task.ranks_per_node = ranks_per_node;
  check_ranks(where, task.num_ranks, ranks_per_node);
}

}  // namespace moetuner::python
