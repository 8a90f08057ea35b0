#include "moetuner/planning/balance.h"

#include "bindings.h"
#include "numpy_arrays.h"

namespace moetuner::python {
namespace {

namespace py = pybind11;

Array<std::int32_t> pack_by_load(const Array<double>& load,
                                 std::int64_t num_ranks,
                                 std::int64_t slots_per_rank) {
  check_rank("pack_by_load: load", load, 1);
  check(num_ranks >= 1 && slots_per_rank >= 1 && num_ranks * slots_per_rank >= load.size(),
        "pack_by_load: " + std::to_string(num_ranks) + " ranks x " +
            std::to_string(slots_per_rank) + " slots cannot hold " + std::to_string(load.size()) +
            " experts");
  auto rank_of = zeros<std::int32_t>({load.size()});
  const BalanceArgs args{.load = load.data(),
                         .rank_of = rank_of.mutable_data(),
                         .num_experts = load.size(),
                         .num_ranks = num_ranks,
                         .slots_per_rank = slots_per_rank};
  const py::gil_scoped_release release;
  moetuner::pack_by_load(args);
  return rank_of;
}

Array<std::int32_t> refine_by_swaps(const Array<double>& load,
                                    const Array<std::int32_t>& rank_of,
                                    std::int64_t num_ranks,
                                    std::int64_t max_swaps) {
  check_rank("refine_by_swaps: load", load, 1);
  check(rank_of.ndim() == 1 && rank_of.size() == load.size(),
        "refine_by_swaps: rank_of must be [" + std::to_string(load.size()) + "] like load, got " +
            shape_of(rank_of));
  Array<std::int32_t> refined(rank_of.size());
  std::copy_n(rank_of.data(), rank_of.size(), refined.mutable_data());
  for (py::ssize_t e = 0; e < rank_of.size(); ++e) {
    check(rank_of.data()[e] >= 0 && rank_of.data()[e] < num_ranks,
          "refine_by_swaps: rank_of holds " + std::to_string(rank_of.data()[e]) + ", outside 0.." +
              std::to_string(num_ranks - 1));
  }
  const BalanceArgs args{.load = load.data(),
                         .rank_of = refined.mutable_data(),
                         .num_experts = load.size(),
                         .num_ranks = num_ranks,
                         .slots_per_rank = 0};
  const py::gil_scoped_release release;
  moetuner::refine_by_swaps(args, max_swaps);
  return refined;
}

}  // namespace

void bind_balance(py::module_& module) {
  module.def("pack_by_load",
             &pack_by_load,
             py::arg("load").noconvert(),
             py::arg("num_ranks"),
             py::arg("slots_per_rank"));
  module.def("refine_by_swaps",
             &refine_by_swaps,
             py::arg("load").noconvert(),
             py::arg("rank_of").noconvert(),
             py::arg("num_ranks"),
             py::arg("max_swaps") = 10'000);
}

}  // namespace moetuner::python
