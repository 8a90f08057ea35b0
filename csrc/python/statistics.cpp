#include "moetuner/planning/statistics.h"

#include "bindings.h"
#include "numpy_arrays.h"
#include "signals.h"

namespace moetuner::python {
namespace {

namespace py = pybind11;

py::dict count_statistics(const Array<std::int16_t>& topk_ids,
                          std::int64_t num_experts,
                          bool coactivation,
                          bool transitions,
                          int num_threads) {
  check_rank("count_statistics: topk_ids", topk_ids, 3);
  check(num_experts >= 1,
        "count_statistics: num_experts must be >= 1, got " + std::to_string(num_experts));
  const std::int64_t num_layers = topk_ids.shape(1);
  auto load = zeros<std::int64_t>({num_layers, num_experts});
  auto pairs = zeros<std::int64_t>({coactivation ? num_layers : 0, num_experts, num_experts});
  const std::int64_t num_steps = transitions && num_layers > 0 ? num_layers - 1 : 0;
  auto steps = zeros<std::int64_t>({num_steps, num_experts, num_experts});
  const StatisticsArgs args{
      .topk_ids = topk_ids.data(),
      .load = load.mutable_data(),
      .coactivation = coactivation ? pairs.mutable_data() : nullptr,
      .transitions = transitions ? steps.mutable_data() : nullptr,
      .num_tokens = topk_ids.shape(0),
      .num_layers = num_layers,
      .top_k = topk_ids.shape(2),
      .num_experts = num_experts,
      .num_threads = num_threads,
      .between = hearing_signals(),
  };
  {
    const py::gil_scoped_release release;
    moetuner::count_statistics(args);
  }
  py::dict result;
  result["load"] = load;
  result["coactivation"] = coactivation ? py::object(pairs) : py::none();
  result["transitions"] = transitions ? py::object(steps) : py::none();
  return result;
}

}  // namespace

void bind_statistics(py::module_& module) {
  module.def("count_statistics",
             &count_statistics,
             py::arg("topk_ids").noconvert(),
             py::arg("num_experts"),
             py::arg("coactivation"),
             py::arg("transitions"),
             py::arg("num_threads") = 0);
}

}  // namespace moetuner::python
