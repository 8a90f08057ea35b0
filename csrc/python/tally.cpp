#include "moetuner/planning/tally.h"

#include "bindings.h"
#include "choices.h"
#include "numpy_arrays.h"
#include "signals.h"

#include <pybind11/stl.h>

#include <optional>

namespace moetuner::python {
namespace {

namespace py = pybind11;

void check_tokens(const std::string& name,
                  const py::array& array,
                  const std::int32_t low,
                  const std::int64_t high,
                  std::int64_t num_tokens,
                  const auto* values) {
  check(array.ndim() == 1 && array.shape(0) == num_tokens,
        "tally_routing: " + name + " must be [" + std::to_string(num_tokens) +
            "], one per token, got " + shape_of(array));
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    check(values[t] >= low && values[t] < high,
          "tally_routing: " + name + "[" + std::to_string(t) + "] = " + std::to_string(values[t]) +
              " is outside 0.." + std::to_string(high - 1));
  }
}

void check_arguments(const TallyArgs& args, const Array<std::int32_t>& slot_experts) {
  check(args.num_ranks >= 1 && args.num_ranks <= 32767 && args.ranks_per_node >= 1 &&
            args.num_ranks % args.ranks_per_node == 0,
        "tally_routing: ranks_per_node must divide num_ranks, got " +
            std::to_string(args.ranks_per_node) + " and " + std::to_string(args.num_ranks));
  check(slot_experts.shape(0) == args.num_layers && args.num_slots % args.num_ranks == 0 &&
            args.num_slots > 0,
        "tally_routing: slot_experts must be [" + std::to_string(args.num_layers) +
            " layers, slots], slots a multiple of num_ranks, got " + shape_of(slot_experts));
  for (py::ssize_t i = 0; i < slot_experts.size(); ++i) {
    const std::int32_t expert = slot_experts.data()[i];
    check(expert >= -1 && expert < args.num_experts,
          "tally_routing: slot_experts holds " + std::to_string(expert) + ", outside -1.." +
              std::to_string(args.num_experts - 1));
  }
  check(args.num_groups >= 1,
        "tally_routing: num_groups must be >= 1, got " + std::to_string(args.num_groups));
}

/// Each rank's slot of an expert holds that expert.
void check_rank_slots(const TallyArgs& args, const std::optional<Array<std::int32_t>>& rank_slots) {
  const bool wanted = args.replica_rule == ReplicaRule::kSglangStatic;
  check(wanted == rank_slots.has_value(),
        "tally_routing: rank_slots are for replica_rule sglang-static, and no other");
  if (!wanted) return;
  check(rank_slots->ndim() == 3 && rank_slots->shape(0) == args.num_layers &&
            rank_slots->shape(1) == args.num_ranks && rank_slots->shape(2) == args.num_experts,
        "tally_routing: rank_slots must be [layers, ranks, experts], got " + shape_of(*rank_slots));
  const std::int32_t* slots = rank_slots->data();
  for (std::int64_t i = 0; i < rank_slots->size(); ++i) {
    if (slots[i] == -1) continue;
    const std::int64_t layer = i / (args.num_ranks * args.num_experts);
    check(slots[i] >= 0 && slots[i] < args.num_slots &&
              args.slot_experts[layer * args.num_slots + slots[i]] == i % args.num_experts,
          "tally_routing: rank_slots names slot " + std::to_string(slots[i]) +
              ", which does not hold expert " + std::to_string(i % args.num_experts));
  }
}

py::dict tally_routing(const Array<std::int16_t>& topk_ids,
                       const Array<std::int32_t>& slot_experts,
                       std::int64_t num_experts,
                       std::int64_t num_ranks,
                       std::int64_t ranks_per_node,
                       const WireRules& wire,
                       Homes homes,
                       ReplicaRule replica_rule,
                       const std::optional<Array<std::int32_t>>& rank_slots,
                       const std::optional<Array<std::int16_t>>& home_rank,
                       const Array<std::int32_t>& group,
                       std::int64_t num_groups,
                       int num_threads) {
  check_rank("tally_routing: topk_ids", topk_ids, 3);
  check_rank("tally_routing: slot_experts", slot_experts, 2);
  TallyArgs args{};
  args.topk_ids = topk_ids.data();
  args.slot_experts = slot_experts.data();
  args.group = group.data();
  args.num_tokens = topk_ids.shape(0);
  args.num_layers = topk_ids.shape(1);
  args.top_k = topk_ids.shape(2);
  args.num_experts = num_experts;
  args.num_slots = slot_experts.shape(1);
  args.num_ranks = num_ranks;
  args.ranks_per_node = ranks_per_node;
  args.num_groups = num_groups;
  args.wire = wire;
  args.homes = homes;
  args.replica_rule = replica_rule;
  args.num_threads = num_threads;
  args.between = hearing_signals();
  check_arguments(args, slot_experts);
  check_rank_slots(args, rank_slots);
  if (rank_slots) args.rank_slots = rank_slots->data();
  check_tokens("group", group, 0, num_groups, args.num_tokens, group.data());
  if (args.homes == Homes::kRecorded) {
    check(home_rank.has_value(), "tally_routing: recorded homes need home_rank, got None");
    check_tokens("home_rank", *home_rank, 0, num_ranks, args.num_tokens, home_rank->data());
    args.home_rank = home_rank->data();
  }

  py::dict result;
  const auto output = [&](const char* name, std::initializer_list<std::int64_t> shape) {
    auto array = zeros<std::int64_t>(shape);
    result[name] = array;
    return array.mutable_data();
  };
  const std::int64_t layers = args.num_layers;
  const std::int64_t nodes = num_ranks / ranks_per_node;
  args.slot_rows = output("slot_rows", {num_groups, layers, args.num_slots});
  if (deals_out(homes, replica_rule)) {
    args.slot_used = output("slot_used", {num_groups, layers, args.num_slots});
  }
  args.rank_egress = output("rank_egress", {num_groups, layers, num_ranks});
  args.rank_ingress = output("rank_ingress", {num_groups, layers, num_ranks});
  args.node_egress = output("node_egress", {num_groups, layers, nodes});
  args.node_ingress = output("node_ingress", {num_groups, layers, nodes});
  args.return_rank_egress = output("return_rank_egress", {num_groups, layers, num_ranks});
  args.return_rank_ingress = output("return_rank_ingress", {num_groups, layers, num_ranks});
  args.return_node_egress = output("return_node_egress", {num_groups, layers, nodes});
  args.return_node_ingress = output("return_node_ingress", {num_groups, layers, nodes});
  args.distinct_ranks = output("distinct_ranks", {num_groups, layers});
  args.distinct_nodes = output("distinct_nodes", {num_groups, layers});
  args.remote_ranks = output("remote_ranks", {num_groups, layers});
  args.remote_nodes = output("remote_nodes", {num_groups, layers});
  args.traffic = output("traffic", {layers, num_ranks, num_ranks});
  {
    const py::gil_scoped_release release;
    moetuner::tally_routing(args);
  }
  result["scale"] = tally_scale(args.homes, num_ranks);
  return result;
}

}  // namespace

void bind_tally(py::module_& module) {
  module.def("tally_routing",
             &tally_routing,
             py::arg("topk_ids").noconvert(),
             py::arg("slot_experts").noconvert(),
             py::arg("num_experts"),
             py::arg("num_ranks"),
             py::arg("ranks_per_node"),
             py::arg("wire"),
             py::arg("homes"),
             py::arg("replica_rule"),
             py::arg("rank_slots").noconvert(),
             py::arg("home_rank").noconvert(),
             py::arg("group").noconvert(),
             py::arg("num_groups"),
             py::arg("num_threads") = 0);
}

}  // namespace moetuner::python
