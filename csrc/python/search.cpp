#include "moetuner/planning/search.h"

#include "bindings.h"
#include "choices.h"
#include "numpy_arrays.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

namespace moetuner::python {
namespace {

namespace py = pybind11;

/// The arrays of a `SearchProblem`, kept as long as it is.
struct ProblemArrays {
  Array<std::int16_t> topk_ids;
  Array<std::int64_t> scenario_begin;
  Array<std::int32_t> load;
  Array<std::uint8_t> active;
  Array<double> row_scale;
  Array<double> weight;
  Array<std::int64_t> token;
  std::optional<Array<std::int32_t>> home;
  std::optional<Array<std::int32_t>> stay_rank;
};

struct BoundProblem {
  ProblemArrays arrays;
  SearchProblem view;
};

void check_values(const std::string& where, const Array<std::int32_t>& ranks, std::int64_t count) {
  for (py::ssize_t i = 0; i < ranks.size(); ++i) {
    check(ranks.data()[i] >= 0 && ranks.data()[i] < count,
          where + " holds " + std::to_string(ranks.data()[i]) + ", outside 0.." +
              std::to_string(count - 1));
  }
}

void check_vector(const char* name, const py::array& array, std::int64_t size) {
  check(array.ndim() == 1 && array.shape(0) == size,
        std::string("SearchProblem: ") + name + " must be [" + std::to_string(size) + "], got " +
            shape_of(array));
}

void check_scenarios(const Array<std::int64_t>& begin, std::int64_t num_tokens) {
  check(begin.ndim() == 1 && begin.size() >= 2,
        "SearchProblem: scenario_begin must be [scenarios + 1], got " + shape_of(begin));
  const py::ssize_t last = begin.size() - 1;
  check(begin.data()[0] == 0 && begin.data()[last] == num_tokens,
        "SearchProblem: scenario_begin must run from 0 to the number of tokens");
  for (py::ssize_t s = 0; s < last; ++s) {
    check(begin.data()[s] <= begin.data()[s + 1], "SearchProblem: scenario_begin must not fall");
  }
}

void check_arrays(const ProblemArrays& arrays) {
  check_rank("SearchProblem: topk_ids", arrays.topk_ids, 3);
  check_scenarios(arrays.scenario_begin, arrays.topk_ids.shape(0));
  check_rank("SearchProblem: load", arrays.load, 3);
  const std::int64_t scenarios = arrays.scenario_begin.size() - 1;
  check(arrays.load.shape(0) == scenarios && arrays.load.shape(1) == arrays.topk_ids.shape(1),
        "SearchProblem: load must be [scenarios, layers, experts], got " + shape_of(arrays.load));
  check(shape_of(arrays.active) == shape_of(arrays.load),
        "SearchProblem: active must be " + shape_of(arrays.load) + " like load, got " +
            shape_of(arrays.active));
  check_vector("row_scale", arrays.row_scale, scenarios);
  check_vector("weight", arrays.weight, scenarios);
  check_vector("token", arrays.token, arrays.topk_ids.shape(0));
  for (py::ssize_t t = 0; t < arrays.token.size(); ++t) {
    check(arrays.token.data()[t] >= 0,
          "SearchProblem: token must be >= 0, got " + std::to_string(arrays.token.data()[t]));
  }
}

BoundProblem make_problem(const Array<std::int16_t>& topk_ids,
                          const Array<std::int64_t>& scenario_begin,
                          const Array<std::int32_t>& load,
                          const Array<std::uint8_t>& active,
                          const Array<double>& row_scale,
                          const Array<double>& weight,
                          const Array<std::int64_t>& token,
                          const std::optional<Array<std::int32_t>>& home,
                          std::int64_t ranks_per_node,
                          const WireRules& wire,
                          Homes homes,
                          ReplicaRule replica_rule,
                          const Rates& rates,
                          const Smoothing& smoothing,
                          const std::optional<Array<std::int32_t>>& stay_rank,
                          double move_seconds,
                          bool replicas) {
  const ProblemArrays arrays{
      topk_ids, scenario_begin, load, active, row_scale, weight, token, home, stay_rank};
  check_arrays(arrays);
  const auto ranks = static_cast<std::int64_t>(rates.rank_speeds.size());
  check(ranks_per_node >= 1 && ranks % ranks_per_node == 0,
        "SearchProblem: ranks_per_node must divide the ranks of rates, got " +
            std::to_string(ranks_per_node) + " and " + std::to_string(ranks));
  check(rates.node_links.fits(ranks / ranks_per_node),
        "SearchProblem: node_links of rates must be of all nodes, or empty");
  if (home) {
    check_vector("home", *home, topk_ids.shape(0));
    check_values("SearchProblem: home", *home, ranks);
  }
  if (stay_rank) {
    check(stay_rank->ndim() == 2 && stay_rank->shape(0) == load.shape(1) &&
              stay_rank->shape(1) == load.shape(2),
          "SearchProblem: stay_rank must be [layers, experts], got " + shape_of(*stay_rank));
  }
  const SearchProblem view{.topk_ids = topk_ids.data(),
                           .scenario_begin = scenario_begin.data(),
                           .load = load.data(),
                           .active = active.data(),
                           .row_scale = row_scale.data(),
                           .weight = weight.data(),
                           .token = token.data(),
                           .home = home ? home->data() : nullptr,
                           .num_tokens = topk_ids.shape(0),
                           .num_layers = topk_ids.shape(1),
                           .top_k = topk_ids.shape(2),
                           .num_experts = load.shape(2),
                           .num_ranks = ranks,
                           .ranks_per_node = ranks_per_node,
                           .num_scenarios = scenario_begin.size() - 1,
                           .wire = wire,
                           .follow = homes == Homes::kFollow,
                           .price = LayerPrice(rates),
                           .smoothing = smoothing,
                           .stay_rank = stay_rank ? stay_rank->data() : nullptr,
                           .move_seconds = move_seconds,
                           .replica_rule = replica_rule,
                           .replicas = replicas};
  return {arrays, view};
}

SearchOptions make_options(std::int64_t proposals,
                           std::int64_t sweeps,
                           double start_temperature,
                           double end_temperature,
                           std::uint64_t seed,
                           int num_threads,
                           double seconds,
                           bool fills_time) {
  check(sweeps >= 1, "SearchOptions: sweeps must be >= 1, got " + std::to_string(sweeps));
  return {proposals,
          sweeps,
          start_temperature,
          end_temperature,
          seed,
          num_threads,
          seconds,
          fills_time};
}

/// Every expert has a slot in every layer, and no rank holds one twice.
void check_slots(const SearchProblem& problem, const Array<std::int32_t>& start) {
  const std::int64_t num_slots = start.shape(1);
  const std::int64_t per_rank = num_slots / problem.num_ranks;
  for (std::int64_t layer = 0; layer < problem.num_layers; ++layer) {
    const std::int32_t* slots = start.data() + layer * num_slots;
    std::vector<std::int64_t> last_rank(static_cast<std::size_t>(problem.num_experts), -1);
    for (std::int64_t p = 0; p < num_slots; ++p) {
      check(slots[p] >= -1 && slots[p] < problem.num_experts,
            "search_tokens: start holds " + std::to_string(slots[p]) + ", outside -1.." +
                std::to_string(problem.num_experts - 1));
      if (slots[p] < 0) continue;
      check(last_rank[slots[p]] != p / per_rank,
            "search_tokens: a rank holds expert " + std::to_string(slots[p]) + " twice");
      last_rank[slots[p]] = p / per_rank;
    }
    for (std::int64_t e = 0; e < problem.num_experts; ++e) {
      check(last_rank[e] >= 0, "search_tokens: expert " + std::to_string(e) + " has no slot");
    }
  }
}

void check_start(const std::string& where,
                 const SearchProblem& problem,
                 const Array<std::int32_t>& start,
                 const Array<std::int32_t>& stop) {
  check(start.ndim() == 2 && start.shape(0) == problem.num_layers &&
            start.shape(1) >= problem.num_experts && start.shape(1) % problem.num_ranks == 0,
        where + ": start must be [" + std::to_string(problem.num_layers) +
            " layers, slots], slots a multiple of the ranks and enough for the experts, got " +
            shape_of(start));
  check(stop.ndim() == 1 && stop.shape(0) == 1,
        where + ": stop must be [1], got " + shape_of(stop));
}

using Found = std::pair<Array<std::int32_t>, Array<double>>;
using Search = void (*)(const SearchProblem&, const SearchOptions&, const SearchState&);

Found run(Search search,
          const SearchProblem& problem,
          const SearchOptions& options,
          const Array<std::int32_t>& start,
          const Array<std::int32_t>& stop) {
  auto found = zeros<std::int32_t>({start.shape(0), start.shape(1)});
  auto cost = zeros<double>({problem.num_layers});
  std::copy_n(start.data(), start.size(), found.mutable_data());
  const SearchState state{.places = found.mutable_data(),
                          .num_slots = start.shape(1),
                          .cost = cost.mutable_data(),
                          .stop = stop.data()};
  {
    const py::gil_scoped_release release;
    search(problem, options, state);
  }
  return {found, cost};
}

Found search_layers(const BoundProblem& problem,
                    const SearchOptions& options,
                    const Array<std::int32_t>& start,
                    const Array<std::int32_t>& stop) {
  const SearchProblem& view = problem.view;
  check_start("search_layers", view, start, stop);
  check_values("search_layers: start", start, view.num_ranks);
  check(view.home == nullptr || (view.wire.once_per_place() && view.top_k >= 1),
        "search_layers: homes need a row per rank and node, and a choice per token; use "
        "search_tokens");
  return run(&moetuner::search_layers, view, options, start, stop);
}

Found search_tokens(const BoundProblem& problem,
                    const SearchOptions& options,
                    const Array<std::int32_t>& start,
                    const Array<std::int32_t>& stop) {
  check_start("search_tokens", problem.view, start, stop);
  check(problem.view.home != nullptr, "search_tokens: wanted the home of each token, got None");
  check_slots(problem.view, start);
  return run(&moetuner::search_tokens, problem.view, options, start, stop);
}

void bind_problem(py::module_& module) {
  py::class_<Smoothing>(module, "Smoothing", "What a search adds to the price, in seconds.")
      .def(py::init([](double peak,
                       double pooled,
                       double variance,
                       double rank_copies,
                       double node_copies) {
             return Smoothing{peak, pooled, variance, rank_copies, node_copies};
           }),
           py::kw_only(),
           py::arg("peak"),
           py::arg("pooled"),
           py::arg("variance"),
           py::arg("rank_copies"),
           py::arg("node_copies"))
      .def_readonly("peak", &Smoothing::peak)
      .def_readonly("pooled", &Smoothing::pooled)
      .def_readonly("variance", &Smoothing::variance)
      .def_readonly("rank_copies", &Smoothing::rank_copies)
      .def_readonly("node_copies", &Smoothing::node_copies)
      .def("of_nodes",
           &Smoothing::of_nodes,
           py::arg("ranks_per_node"),
           "The same for whole nodes in the place of ranks.");
  py::class_<BoundProblem>(module, "SearchProblem", "What a search looks at; keeps its arrays.")
      .def(py::init(&make_problem),
           py::kw_only(),
           py::arg("topk_ids").noconvert(),
           py::arg("scenario_begin").noconvert(),
           py::arg("load").noconvert(),
           py::arg("active").noconvert(),
           py::arg("row_scale").noconvert(),
           py::arg("weight").noconvert(),
           py::arg("token").noconvert(),
           py::arg("home").noconvert(),
           py::arg("ranks_per_node"),
           py::arg("wire"),
           py::arg("homes"),
           py::arg("replica_rule"),
           py::arg("rates"),
           py::arg("smoothing"),
           py::arg("stay_rank").noconvert() = py::none(),
           py::arg("move_seconds") = 0.0,
           py::arg("replicas") = false)
      .def_property_readonly("num_ranks",
                             [](const BoundProblem& problem) { return problem.view.num_ranks; });
  py::class_<SearchOptions>(module, "SearchOptions", "How long and how hot a search is.")
      .def(py::init(&make_options),
           py::kw_only(),
           py::arg("proposals"),
           py::arg("sweeps"),
           py::arg("start_temperature"),
           py::arg("end_temperature"),
           py::arg("seed"),
           py::arg("num_threads"),
           py::arg("seconds"),
           py::arg("fills_time") = false);
}

}  // namespace

void bind_search(py::module_& module) {
  bind_problem(module);
  module.def("search_layers",
             &search_layers,
             py::arg("problem"),
             py::arg("options"),
             py::arg("start").noconvert(),
             py::arg("stop").noconvert(),
             "Ranks [L, P] of experts and empty slots from `start`, and search costs [L].");
  module.def("search_tokens",
             &search_tokens,
             py::arg("problem"),
             py::arg("options"),
             py::arg("start").noconvert(),
             py::arg("stop").noconvert(),
             "Experts [L, P] of slots from `start`, and search costs [L].");
}

}  // namespace moetuner::python
