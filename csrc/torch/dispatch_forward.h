#pragma once

#include "path.h"
#include "routing_args.h"

#include <optional>
#include <string>
#include <vector>

namespace moetuner {

constexpr const char* kDispatchOp = "dispatch";

/// The arguments of the op, in the order of its schema.
struct DispatchInputs {
  const at::Tensor& x;
  const at::Tensor& topk_ids;
  const at::Tensor& weights;
  const at::Tensor& candidates;
  const at::Tensor& num_candidates;
  std::int64_t slots_per_rank;
  const std::vector<std::string>& groups;      // of `Path`
  const std::optional<c10::SymInt>& capacity;  // with max_rows: the fixed form
  const std::optional<c10::SymInt>& max_rows;
  std::int64_t ranks_per_node;  // 0: all ranks share a node, or as the groups say
  bool counts;                  // whether `counted` is wanted

  bool fixed() const { return capacity.has_value(); }
};

/// What the op returns, as a list in this order; the maps of the hops last.
struct Dispatched {
  at::Tensor rows, end_offsets, recv_map, recv_weights;
  at::Tensor overflow;  // of the fixed form; else empty
  at::Tensor counted;   // where wanted; else empty
  std::vector<at::Tensor> send_maps, splits;

  static constexpr std::size_t kNumFixed = 6;  // tensors ahead of the maps

  std::vector<at::Tensor> as_list() const {
    std::vector<at::Tensor> list{rows, end_offsets, recv_map, recv_weights, overflow, counted};
    list.insert(list.end(), send_maps.begin(), send_maps.end());
    list.insert(list.end(), splits.begin(), splits.end());
    return list;
  }
};

/// Sizes of a call; `capacity` and `max_rows` are 0 in the exact form.
struct Sizes {
  std::int64_t num_ranks, ranks_per_node;
  bool crosses_nodes;  // by a hop of its own
  std::int64_t capacity, max_rows;

  std::int64_t num_nodes() const { return num_ranks / ranks_per_node; }
  /// Of the first hop, which goes to ranks or, of two hops, to nodes.
  std::int64_t ranks_per_place() const { return crosses_nodes ? ranks_per_node : 1; }
  std::int64_t num_places() const { return num_ranks / ranks_per_place(); }
  /// Of the second hop alone, as if there were no other: it has room for all that the first brings.
  Sizes inside() const {
    return {ranks_per_node, ranks_per_node, false, capacity * num_nodes(), max_rows};
  }
  /// Counters of the second hop.
  std::int64_t num_passed_on() const { return crosses_nodes ? ranks_per_node : 0; }
};

/// Throws, naming the argument, what was wanted and what came.
Sizes check_dispatch(const DispatchInputs& in, const Path& path);

Dispatched dispatch_cpu(const DispatchInputs& in);
Dispatched dispatch_cuda(const DispatchInputs& in);

}  // namespace moetuner
