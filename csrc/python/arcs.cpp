#include "moetuner/planning/arcs.h"

#include "bindings.h"
#include "numpy_arrays.h"

#include <pybind11/native_enum.h>

namespace moetuner::python {
namespace {

namespace py = pybind11;

py::dict cheapest_arcs(const Array<std::int32_t>& rank_of,
                       const Array<double>& rank_rows,
                       const Array<double>& node_rows,
                       const Array<std::int32_t>& rename,
                       const Array<double>& link_seconds,
                       const Array<double>& weight,
                       std::int64_t ranks_per_node,
                       ArcCost cost,
                       Crossing crossing,
                       const LinkRates& dispatch,
                       const LinkFactors& rank_links,
                       const LinkFactors& node_links,
                       int num_threads) {
  check_rank("cheapest_arcs: rank_of", rank_of, 2);
  check_rank("cheapest_arcs: rank_rows", rank_rows, 4);
  check_rank("cheapest_arcs: node_rows", node_rows, 4);
  check_rank("cheapest_arcs: rename", rename, 2);
  check_rank("cheapest_arcs: link_seconds", link_seconds, 2);
  check_rank("cheapest_arcs: weight", weight, 1);
  const std::int64_t states = rank_of.shape(0);
  const std::int64_t experts = rank_of.shape(1);
  const std::int64_t ranks = rename.shape(1);
  check(ranks_per_node >= 1 && ranks % ranks_per_node == 0,
        "cheapest_arcs: ranks_per_node must divide " + std::to_string(ranks));
  const std::int64_t nodes = ranks / ranks_per_node;
  const std::int64_t batches = weight.shape(0);
  const auto fits = [&](const Array<double>& rows, std::int64_t width) {
    return rows.shape(0) == batches && rows.shape(1) == states && rows.shape(2) == experts &&
           rows.shape(3) == width;
  };
  check(fits(rank_rows, ranks) && fits(node_rows, nodes) && link_seconds.shape(0) == ranks &&
            link_seconds.shape(1) == ranks,
        "cheapest_arcs: rows must be [batches, states, experts, ranks or nodes] and link_seconds "
        "[ranks, ranks], got " +
            shape_of(rank_rows) + ", " + shape_of(node_rows) + " and " + shape_of(link_seconds));
  const auto in_range = [&](const Array<std::int32_t>& names) {
    return std::all_of(names.data(), names.data() + names.size(), [&](std::int32_t rank) {
      return rank >= 0 && rank < ranks;
    });
  };
  check(rank_links.fits(ranks) && node_links.fits(nodes),
        "cheapest_arcs: rank_links and node_links must be of all ranks and nodes, or empty");
  check(in_range(rank_of) && in_range(rename), "cheapest_arcs: a rank is out of range");
  auto best = zeros<double>({states, states});
  auto renamed = zeros<std::int32_t>({states, states});
  const ArcArgs args{.rank_of = rank_of.data(),
                     .rank_rows = rank_rows.data(),
                     .node_rows = node_rows.data(),
                     .rename = rename.data(),
                     .link_seconds = link_seconds.data(),
                     .weight = weight.data(),
                     .num_batches = batches,
                     .num_states = states,
                     .num_experts = experts,
                     .num_ranks = ranks,
                     .ranks_per_node = ranks_per_node,
                     .num_renames = rename.shape(0),
                     .cost = cost,
                     .crossing = crossing,
                     .dispatch = dispatch,
                     .rank_links = rank_links,
                     .node_links = node_links,
                     .num_threads = num_threads,
                     .best = best.mutable_data(),
                     .renamed = renamed.mutable_data()};
  {
    const py::gil_scoped_release release;
    moetuner::cheapest_arcs(args);
  }
  py::dict result;
  result["best"] = best;
  result["renamed"] = renamed;
  return result;
}

}  // namespace

void bind_arcs(py::module_& module) {
  py::native_enum<ArcCost>(module, "ArcCost", "enum.Enum", "What a step between layers costs.")
      .value("EXCHANGE", ArcCost::kExchange)
      .value("SLOWEST_PAIR", ArcCost::kSlowestPair)
      .value("REMOTE", ArcCost::kRemote)
      .finalize();
  module.def("cheapest_arcs",
             &cheapest_arcs,
             py::kw_only(),
             py::arg("rank_of").noconvert(),
             py::arg("rank_rows").noconvert(),
             py::arg("node_rows").noconvert(),
             py::arg("rename").noconvert(),
             py::arg("link_seconds").noconvert(),
             py::arg("weight").noconvert(),
             py::arg("ranks_per_node"),
             py::arg("cost"),
             py::arg("crossing"),
             py::arg("dispatch"),
             py::arg("rank_links"),
             py::arg("node_links"),
             py::arg("num_threads") = 0);
}

}  // namespace moetuner::python
