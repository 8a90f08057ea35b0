#include "moetuner/planning/search.h"

#include "bindings.h"
#include "numpy_arrays.h"
#include "search_arguments.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>

namespace moetuner::python {
namespace {

namespace py = pybind11;

void check_values(const std::string& where, const Array<std::int32_t>& ranks, std::int64_t count) {
  for (py::ssize_t i = 0; i < ranks.size(); ++i) {
    check(ranks.data()[i] >= 0 && ranks.data()[i] < count,
          where + " holds " + std::to_string(ranks.data()[i]) + ", outside 0.." +
              std::to_string(count - 1));
  }
}

void check_arguments(const SearchArgs& args, const Array<std::int32_t>& rank_of) {
  check(rank_of.shape(0) == args.num_layers && args.num_slots >= args.num_experts &&
            args.num_slots % args.num_ranks == 0,
        "search_layers: rank_of must be [" + std::to_string(args.num_layers) +
            " layers, slots], slots a multiple of num_ranks and enough for the experts, got " +
            shape_of(rank_of));
  check_values("search_layers: rank_of", rank_of, args.num_ranks);
}

py::tuple search_layers(const Array<std::int16_t>& topk_ids,
                        const Array<std::int64_t>& scenario_begin,
                        const Array<std::int32_t>& load,
                        const Array<std::uint8_t>& active,
                        const Array<double>& row_scale,
                        const Array<double>& weight,
                        const Array<double>& rank_speed,
                        const Array<double>& weights,
                        std::int64_t ranks_per_node,
                        bool dedup,
                        bool gather,
                        const std::optional<Array<std::int32_t>>& stay_rank,
                        double move_seconds,
                        const Array<std::int32_t>& rank_of,
                        std::int64_t proposals,
                        double start_temperature,
                        double end_temperature,
                        std::uint64_t seed,
                        int num_threads,
                        double seconds,
                        const Array<std::int32_t>& stop,
                        const std::optional<Array<std::int32_t>>& home,
                        bool follow,
                        double dispatch_share,
                        std::int64_t sweeps) {
  SearchArgs args{};
  fill_task(args,
            "search_layers",
            {topk_ids, scenario_begin, row_scale, weight, rank_speed, weights, stop},
            ranks_per_node);
  check_rank("search_layers: load", load, 3);
  check_rank("search_layers: rank_of", rank_of, 2);
  check(load.shape(0) == args.num_scenarios && load.shape(1) == args.num_layers,
        "search_layers: load must be [scenarios, layers, experts], got " + shape_of(load));
  check(shape_of(active) == shape_of(load),
        "search_layers: active must be " + shape_of(load) + " like load, got " + shape_of(active));
  args.load = load.data();
  args.active = active.data();
  args.num_experts = load.shape(2);
  args.num_slots = rank_of.shape(1);
  args.dedup = dedup;
  args.gather = gather;
  if (stay_rank.has_value()) {
    check(stay_rank->ndim() == 2 && stay_rank->shape(0) == args.num_layers &&
              stay_rank->shape(1) == args.num_experts,
          "search_layers: stay_rank must be [layers, experts], got " + shape_of(*stay_rank));
    args.stay_rank = stay_rank->data();
  }
  args.move_seconds = move_seconds;
  if (home.has_value()) {
    check(dedup && home->ndim() == 1 && home->size() == topk_ids.shape(0) && sweeps >= 1 &&
              args.top_k >= 1,
          "search_layers: home must be [tokens], with dedup, a choice and a sweep, got " +
              shape_of(*home));
    check_values("search_layers: home", *home, rank_speed.size());
    args.home = home->data();
  }
  args.follow = follow;
  args.dispatch_share = dispatch_share;
  args.sweeps = sweeps;
  args.proposals = proposals;
  args.start_temperature = start_temperature;
  args.end_temperature = end_temperature;
  args.seed = seed;
  args.num_threads = num_threads;
  args.seconds = seconds;
  check_arguments(args, rank_of);
  auto found = zeros<std::int32_t>({args.num_layers, args.num_slots});
  auto cost = zeros<double>({args.num_layers});
  std::copy_n(rank_of.data(), rank_of.size(), found.mutable_data());
  args.rank_of = found.mutable_data();
  args.cost = cost.mutable_data();
  {
    const py::gil_scoped_release release;
    moetuner::search_layers(args);
  }
  return py::make_tuple(found, cost);
}

}  // namespace

void bind_search(py::module_& module) {
  module.def("search_layers",
             &search_layers,
             py::arg("topk_ids").noconvert(),
             py::arg("scenario_begin").noconvert(),
             py::arg("load").noconvert(),
             py::arg("active").noconvert(),
             py::arg("row_scale").noconvert(),
             py::arg("weight").noconvert(),
             py::arg("rank_speed").noconvert(),
             py::arg("weights").noconvert(),
             py::arg("ranks_per_node"),
             py::arg("dedup"),
             py::arg("gather"),
             py::arg("stay_rank").noconvert(),
             py::arg("move_seconds"),
             py::arg("rank_of").noconvert(),
             py::arg("proposals"),
             py::arg("start_temperature"),
             py::arg("end_temperature"),
             py::arg("seed"),
             py::arg("num_threads"),
             py::arg("seconds"),
             py::arg("stop").noconvert(),
             py::arg("home").noconvert() = py::none(),
             py::arg("follow") = false,
             py::arg("dispatch_share") = 1.0,
             py::arg("sweeps") = 1);
}

}  // namespace moetuner::python
