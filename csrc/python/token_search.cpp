#include "moetuner/planning/token_search.h"

#include "bindings.h"
#include "numpy_arrays.h"
#include "search_arguments.h"

namespace moetuner::python {
namespace {

namespace py = pybind11;

/// Every expert has a slot in every layer, and no rank holds one twice.
void check_slots(const TokenSearchArgs& args) {
  const std::int64_t per_rank = args.num_slots / args.num_ranks;
  for (std::int64_t layer = 0; layer < args.num_layers; ++layer) {
    const std::int32_t* slots = args.slot_experts + layer * args.num_slots;
    std::vector<std::int64_t> last_rank(static_cast<std::size_t>(args.num_experts), -1);
    for (std::int64_t p = 0; p < args.num_slots; ++p) {
      check(slots[p] >= -1 && slots[p] < args.num_experts,
            "search_tokens: slot_experts holds " + std::to_string(slots[p]) + ", outside -1.." +
                std::to_string(args.num_experts - 1));
      if (slots[p] < 0) continue;
      check(last_rank[slots[p]] != p / per_rank,
            "search_tokens: a rank holds expert " + std::to_string(slots[p]) + " twice");
      last_rank[slots[p]] = p / per_rank;
    }
    for (std::int64_t e = 0; e < args.num_experts; ++e) {
      check(last_rank[e] >= 0, "search_tokens: expert " + std::to_string(e) + " has no slot");
    }
  }
}

py::tuple search_tokens(const Array<std::int16_t>& topk_ids,
                        const Array<std::int64_t>& scenario_begin,
                        const Array<double>& row_scale,
                        const Array<double>& weight,
                        const Array<double>& rank_speed,
                        const Array<std::int32_t>& home,
                        const Array<std::int64_t>& token,
                        const Array<double>& weights,
                        double dispatch_share,
                        std::int64_t num_experts,
                        std::int64_t ranks_per_node,
                        int wire,
                        bool follow,
                        bool replicas,
                        const Array<std::int32_t>& slot_experts,
                        std::int64_t proposals,
                        std::int64_t sweeps,
                        double start_temperature,
                        double end_temperature,
                        std::uint64_t seed,
                        int num_threads,
                        double seconds,
                        const Array<std::int32_t>& stop) {
  TokenSearchArgs args{};
  fill_task(args,
            "search_tokens",
            {topk_ids, scenario_begin, row_scale, weight, rank_speed, weights, stop},
            ranks_per_node);
  check_rank("search_tokens: slot_experts", slot_experts, 2);
  check(wire >= 0 && wire <= 2, "search_tokens: wire must be 0..2, got " + std::to_string(wire));
  check(sweeps >= 1, "search_tokens: sweeps must be >= 1, got " + std::to_string(sweeps));
  check_vector("search_tokens", "home", home, args.num_tokens);
  check_vector("search_tokens", "token", token, args.num_tokens);
  args.home = home.data();
  args.token = token.data();
  args.num_experts = num_experts;
  args.num_slots = slot_experts.shape(1);
  args.wire = static_cast<Wire>(wire);
  args.follow = follow;
  args.replicas = replicas;
  args.dispatch_share = dispatch_share;
  args.proposals = proposals;
  args.sweeps = sweeps;
  args.start_temperature = start_temperature;
  args.end_temperature = end_temperature;
  args.seed = seed;
  args.num_threads = num_threads;
  args.seconds = seconds;
  check(slot_experts.shape(0) == args.num_layers && args.num_slots % args.num_ranks == 0,
        "search_tokens: slot_experts must be [layers, slots], slots a multiple of the ranks, got " +
            shape_of(slot_experts));
  for (std::int64_t t = 0; t < args.num_tokens; ++t) {
    check(args.home[t] >= 0 && args.home[t] < args.num_ranks && args.token[t] >= 0,
          "search_tokens: home or token out of range at token " + std::to_string(t));
  }
  auto found = zeros<std::int32_t>({args.num_layers, args.num_slots});
  auto cost = zeros<double>({args.num_layers});
  std::copy_n(slot_experts.data(), slot_experts.size(), found.mutable_data());
  args.slot_experts = found.mutable_data();
  args.cost = cost.mutable_data();
  check_slots(args);
  {
    const py::gil_scoped_release release;
    moetuner::search_tokens(args);
  }
  return py::make_tuple(found, cost);
}

}  // namespace

void bind_token_search(py::module_& module) {
  module.def("search_tokens",
             &search_tokens,
             py::arg("topk_ids").noconvert(),
             py::arg("scenario_begin").noconvert(),
             py::arg("row_scale").noconvert(),
             py::arg("weight").noconvert(),
             py::arg("rank_speed").noconvert(),
             py::arg("home").noconvert(),
             py::arg("token").noconvert(),
             py::arg("weights").noconvert(),
             py::arg("dispatch_share"),
             py::arg("num_experts"),
             py::arg("ranks_per_node"),
             py::arg("wire"),
             py::arg("follow"),
             py::arg("replicas"),
             py::arg("slot_experts").noconvert(),
             py::arg("proposals"),
             py::arg("sweeps"),
             py::arg("start_temperature"),
             py::arg("end_temperature"),
             py::arg("seed"),
             py::arg("num_threads"),
             py::arg("seconds"),
             py::arg("stop").noconvert());
}

}  // namespace moetuner::python
