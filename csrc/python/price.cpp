#include "moetuner/planning/price.h"

#include "bindings.h"
#include "choices.h"
#include "numpy_arrays.h"

#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

namespace moetuner::python {
namespace {

namespace py = pybind11;

/// Numbers of any type and layout, read as C-contiguous doubles.
using Numbers = py::array_t<double, py::array::c_style | py::array::forcecast>;

void check_rate(const char* name, double value) {
  check(value >= 0, std::string(name) + " must be >= 0 s, got " + std::to_string(value));
}

LinkRates link_rates(
    double rank_row, double node_row, double rank_latency, double node_latency, Hops hops) {
  check_rate("LinkRates: rank_row", rank_row);
  check_rate("LinkRates: node_row", node_row);
  check_rate("LinkRates: rank_latency", rank_latency);
  check_rate("LinkRates: node_latency", node_latency);
  return {rank_row, node_row, rank_latency, node_latency, hops};
}

ComputeRates compute_rates(double row, double expert) {
  check_rate("ComputeRates: row", row);
  check_rate("ComputeRates: expert", expert);
  return {row, expert};
}

RankCompute rank_compute(const ComputeRates& rates,
                         std::vector<ComputeRates> planes,
                         double start) {
  check_rate("RankCompute: start", start);
  return {rates, std::move(planes), start};
}

WireRules wire_rules(Rows rows, Crossing crossing, Hops hops) {
  const WireRules rules{rows, crossing, hops};
  check(rules.known(),
        "WireRules: rows to all go around a ring and no others do; rows of experts cross directly; "
        "only rows of a gateway take their hops in turn");
  return rules;
}

void check_speeds(const char* where, const std::vector<double>& speeds) {
  check(!speeds.empty(), std::string(where) + " must name the speed of each rank, got none");
  for (const double speed : speeds) {
    check(speed > 0, std::string(where) + " must be > 0, got " + std::to_string(speed));
  }
}

LinkFactors link_factors(std::vector<double> egress, std::vector<double> ingress) {
  check(egress.size() == ingress.size(),
        "LinkFactors: egress and ingress must be of as many places, got " +
            std::to_string(egress.size()) + " and " + std::to_string(ingress.size()));
  for (const auto* factors : {&egress, &ingress}) {
    for (const double factor : *factors) {
      check(factor > 0 && factor <= 1,
            "LinkFactors: must be in (0, 1], got " + std::to_string(factor));
    }
  }
  return {std::move(egress), std::move(ingress)};
}

Rates make_rates(const ComputeRates& compute,
                 const LinkRates& dispatch,
                 const LinkRates& combine,
                 const LinkRates& both_ways,
                 double dispatch_share,
                 std::vector<double> rank_speeds,
                 LinkFactors rank_links,
                 LinkFactors node_links,
                 std::vector<ComputeRates> planes,
                 double layer,
                 std::vector<RankCompute> rank_compute,
                 double floor) {
  check_rate("Rates: layer", layer);
  check_rate("Rates: floor", floor);
  check(dispatch_share >= 0 && dispatch_share <= 1,
        "Rates: dispatch_share must be in [0, 1], got " + std::to_string(dispatch_share));
  check_speeds("Rates: rank_speeds", rank_speeds);
  const auto ranks = static_cast<std::int64_t>(rank_speeds.size());
  check(rank_links.fits(ranks), "Rates: rank_links must be of all ranks, or empty");
  check(rank_compute.empty() || rank_compute.size() == rank_speeds.size(),
        "Rates: rank_compute must be of all ranks, or empty");
  check(node_links.alike() || ranks % static_cast<std::int64_t>(node_links.egress.size()) == 0,
        "Rates: node_links must be of nodes that divide the ranks, or empty");
  return {compute,
          dispatch,
          combine,
          both_ways,
          dispatch_share,
          std::move(rank_speeds),
          std::move(rank_links),
          std::move(node_links),
          std::move(planes),
          layer,
          std::move(rank_compute),
          floor};
}

Rates of_nodes(const Rates& rates, std::vector<double> speeds) {
  check_speeds("Rates.of_nodes: speeds", speeds);
  check(rates.rank_speeds.size() % speeds.size() == 0,
        "Rates.of_nodes: wanted a number of nodes that divides the " +
            std::to_string(rates.rank_speeds.size()) + " ranks, got " +
            std::to_string(speeds.size()));
  return rates.of_nodes(std::move(speeds));
}

void check_alike(const std::string& where, const Numbers& a, const Numbers& b) {
  check(shape_of(a) == shape_of(b),
        where + " must have one shape, got " + shape_of(a) + " and " + shape_of(b));
}

std::vector<py::ssize_t> shape(const Numbers& array, py::ssize_t dimensions) {
  return {array.shape(), array.shape() + dimensions};
}

/// `body(i)` for every cell of an array like `like`.
template <typename Body>
Array<double> each(const Numbers& like, const Body& body) {
  Array<double> found(shape(like, like.ndim()));
  double* seconds = found.mutable_data();
  for (py::ssize_t i = 0; i < like.size(); ++i) seconds[i] = body(i);
  return found;
}

Array<double> compute(const LayerPrice& price, const Numbers& rows, const Numbers& active) {
  check_alike("LayerPrice.compute: rank_rows and active_experts", rows, active);
  check(rows.ndim() >= 1 && rows.shape(rows.ndim() - 1) == price.num_ranks(),
        "LayerPrice.compute: rank_rows must be [..., " + std::to_string(price.num_ranks()) +
            " ranks], got " + shape_of(rows));
  Array<double> found(shape(rows, rows.ndim() - 1));
  price.slowest_rank(rows.data(), active.data(), found.size(), found.mutable_data());
  return found;
}

Array<double> busy(const LayerPrice& price, const Numbers& rows, const Numbers& active) {
  check_alike("LayerPrice.busy: rows and active_experts", rows, active);
  const Rates& rates = price.rates();
  return each(rows, [&](auto i) { return busy_seconds(rates, rows.data()[i], active.data()[i]); });
}

Array<double> exchange(const LayerPrice&,
                       const LinkRates& direction,
                       const Numbers& rank_rows,
                       const Numbers& node_rows) {
  check_alike("LayerPrice.exchange: rank_rows and node_rows", rank_rows, node_rows);
  return each(rank_rows, [&](auto i) {
    return LayerPrice::exchange(direction, rank_rows.data()[i], node_rows.data()[i]);
  });
}

std::vector<ComputeRates> planes_of(const LayerPrice& price, std::int64_t rank) {
  check(rank >= 0 && rank < price.num_ranks(),
        "LayerPrice.planes_of: wanted one of " + std::to_string(price.num_ranks()) +
            " ranks, got " + std::to_string(rank));
  return busy_planes(price.compute_of(rank), price.planes_of(rank));
}

/// Rows on the busiest link, from those of each place.
Array<double> busiest(const LinkFactors& links,
                      const char* where,
                      const Numbers& egress,
                      const Numbers& ingress) {
  check_alike(std::string(where) + ": egress and ingress", egress, ingress);
  check(egress.ndim() >= 1 && egress.shape(egress.ndim() - 1) >= 1 &&
            links.fits(egress.shape(egress.ndim() - 1)),
        std::string(where) + ": wanted rows of all places, got " + shape_of(egress));
  Array<double> found(shape(egress, egress.ndim() - 1));
  const std::int64_t places = egress.shape(egress.ndim() - 1);
  double* rows = found.mutable_data();
  for (py::ssize_t i = 0; i < found.size(); ++i) {
    const std::int64_t first = i * places;
    rows[i] = busiest_link(links, egress.data() + first, ingress.data() + first, places);
  }
  return found;
}

Array<double> busiest_rank(const LayerPrice& price, const Numbers& egress, const Numbers& ingress) {
  return busiest(price.rates().rank_links, "LayerPrice.busiest_rank", egress, ingress);
}

Array<double> busiest_node(const LayerPrice& price, const Numbers& egress, const Numbers& ingress) {
  return busiest(price.rates().node_links, "LayerPrice.busiest_node", egress, ingress);
}

Array<double> total(const LayerPrice&,
                    const Numbers& compute,
                    const Numbers& dispatch,
                    const Numbers& combine) {
  check_alike("LayerPrice.total: compute and dispatch", compute, dispatch);
  check_alike("LayerPrice.total: compute and combine", compute, combine);
  return each(compute, [&](auto i) {
    return LayerPrice::total(compute.data()[i], dispatch.data()[i], combine.data()[i]);
  });
}

void bind_rates(py::module_& module) {
  py::class_<ComputeRates>(module, "ComputeRates", "Seconds of computing, on a rank of speed 1.")
      .def(py::init(&compute_rates), py::kw_only(), py::arg("row"), py::arg("expert"))
      .def_readonly("row", &ComputeRates::row, "Of one (token, expert) row.")
      .def_readonly("expert", &ComputeRates::expert, "Of one expert that has a row.");
  py::class_<RankCompute>(module, "RankCompute", "How one rank of speed 1 computes.")
      .def(py::init(&rank_compute),
           py::kw_only(),
           py::arg("rates"),
           py::arg("planes"),
           py::arg("start"))
      .def_readonly("rates", &RankCompute::rates)
      .def_readonly("planes", &RankCompute::planes, "Where larger than `rates`.")
      .def_readonly("start", &RankCompute::start, "Once, beside `Rates.layer`, at any speed.");
  py::class_<LinkRates>(module, "LinkRates", "Seconds of one direction of the exchange.")
      .def(py::init(&link_rates),
           py::kw_only(),
           py::arg("rank_row"),
           py::arg("node_row"),
           py::arg("rank_latency"),
           py::arg("node_latency"),
           py::arg_v("hops", Hops::kTogether, "Hops.TOGETHER"))
      .def_readonly("rank_row", &LinkRates::rank_row, "Of a row over a rank's link.")
      .def_readonly("node_row", &LinkRates::node_row, "Of a row over a node's links.")
      .def_readonly("rank_latency", &LinkRates::rank_latency, "Where no row leaves its node.")
      .def_readonly("node_latency", &LinkRates::node_latency, "Where a row leaves its node.")
      .def_readonly("hops", &LinkRates::hops);
  py::class_<LinkFactors>(
      module, "LinkFactors", "How slow links are beside `LinkRates`, at most 1; empty: all alike.")
      .def(py::init(&link_factors),
           py::kw_only(),
           py::arg("egress") = std::vector<double>(),
           py::arg("ingress") = std::vector<double>())
      .def_readonly("egress", &LinkFactors::egress, "Of what leaves each rank or node.")
      .def_readonly("ingress", &LinkFactors::ingress, "Of what enters each rank or node.");
  py::class_<Rates>(
      module, "Rates", "All that turns rows of a layer into seconds; see `CostModel.rates`.")
      .def(py::init(&make_rates),
           py::kw_only(),
           py::arg("compute"),
           py::arg("dispatch"),
           py::arg("combine"),
           py::arg("both_ways"),
           py::arg("dispatch_share"),
           py::arg("rank_speeds"),
           py::arg("rank_links"),
           py::arg("node_links"),
           py::arg("planes") = std::vector<ComputeRates>(),
           py::arg("layer") = 0.0,
           py::arg("rank_compute") = std::vector<RankCompute>(),
           py::arg("floor") = 0.0)
      .def_readonly("compute", &Rates::compute)
      .def_readonly("dispatch", &Rates::dispatch)
      .def_readonly("combine", &Rates::combine)
      .def_readonly("both_ways", &Rates::both_ways, "Dispatch and combine together.")
      .def_readonly("dispatch_share", &Rates::dispatch_share, "Of a row's bytes both ways.")
      .def_readonly("rank_speeds", &Rates::rank_speeds, "[G], relative to `compute`.")
      .def_readonly("rank_links", &Rates::rank_links, "Of ranks inside their node.")
      .def_readonly("node_links", &Rates::node_links, "Of nodes.")
      .def_readonly("planes", &Rates::planes, "Of computing, where larger than `compute`.")
      .def_readonly("layer", &Rates::layer, "Once, where any rank has a row: launches.")
      .def_readonly("rank_compute", &Rates::rank_compute, "[G], or empty where all are alike.")
      .def_readonly("floor", &Rates::floor, "Of computing, at least, beside `layer`.")
      .def("of_nodes",
           &of_nodes,
           py::arg("speeds"),
           "Rates of whole nodes in the place of ranks; `speeds` [N] beside their ranks' number.");
}

}  // namespace

void bind_price(py::module_& module) {
  py::native_enum<Rows>(module, "Rows", "enum.Enum", "Which rows a token sends.")
      .value("PER_RANK", Rows::kPerRank)
      .value("PER_EXPERT", Rows::kPerExpert)
      .value("TO_ALL", Rows::kToAll)
      .finalize();
  py::native_enum<Crossing>(module, "Crossing", "enum.Enum", "How rows reach another node.")
      .value("GATEWAY", Crossing::kGateway)
      .value("DIRECT", Crossing::kDirect)
      .value("RING", Crossing::kRing)
      .finalize();
  py::native_enum<Hops>(
      module, "Hops", "enum.Enum", "What a direction takes on links of both kinds.")
      .value("TOGETHER", Hops::kTogether)
      .value("IN_TURN", Hops::kInTurn)
      .finalize();
  py::class_<WireRules>(module, "WireRules", "All that the planner must know of a wire.")
      .def(py::init(&wire_rules),
           py::kw_only(),
           py::arg("rows"),
           py::arg("crossing"),
           py::arg_v("hops", Hops::kTogether, "Hops.TOGETHER"))
      .def_readonly("rows", &WireRules::rows)
      .def_readonly("crossing", &WireRules::crossing)
      .def_readonly("hops", &WireRules::hops)
      .def_property_readonly("once_per_place",
                             &WireRules::once_per_place,
                             "Whether a token sends one row to each rank and node it visits.");
  module.def("wire_rules", &rules_of, py::arg("wire"), "The rules of a wire.");
  bind_rates(module);
  py::class_<LayerPrice>(module, "LayerPrice", "The time of a layer, from its rows.")
      .def(py::init<Rates>(), py::arg("rates"))
      .def_property_readonly("rates", &LayerPrice::rates)
      .def("compute",
           &compute,
           py::arg("rank_rows"),
           py::arg("active_experts"),
           "Seconds [...] of the slowest rank and of launches, from [..., G] rows and experts that "
           "have some.")
      .def("busy",
           &busy,
           py::arg("rows"),
           py::arg("active_experts"),
           "Seconds of a rank of speed 1 that computes in no way of its own: never falls, and is "
           "convex, in rows and experts.")
      .def_property_readonly(
          "busy_planes",
          [](const LayerPrice& price) {
            return busy_planes(price.rates().compute, price.rates().planes);
          },
          "`busy` as the largest of linear functions.")
      .def("planes_of",
           &planes_of,
           py::arg("rank"),
           "The same of one rank at speed 1, in its own way.")
      .def("busiest_rank",
           &busiest_rank,
           py::arg("egress"),
           py::arg("ingress"),
           "Rows [...] on the busiest link inside a node, from [..., G]; faster links count less.")
      .def("busiest_node",
           &busiest_node,
           py::arg("egress"),
           py::arg("ingress"),
           "Rows [...] on the busiest link between nodes, from [..., N].")
      .def("exchange",
           &exchange,
           py::arg("direction"),
           py::arg("rank_rows"),
           py::arg("node_rows"),
           "Seconds of one direction, from rows on the busiest link of each kind.")
      .def("total",
           &total,
           py::arg("compute"),
           py::arg("dispatch"),
           py::arg("combine"),
           "Seconds of a layer, from those of its parts.");
}

}  // namespace moetuner::python
