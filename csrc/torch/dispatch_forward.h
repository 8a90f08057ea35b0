#pragma once

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
  const std::string& group_name;
  const std::optional<c10::SymInt>& capacity;  // with max_rows: the fixed form
  const std::optional<c10::SymInt>& max_rows;
  std::int64_t ranks_per_node;  // 0: all ranks share a node
  bool counts;                  // whether `counted` is wanted

  bool fixed() const { return capacity.has_value(); }
};

/// What the op returns, as a list in this order.
struct Dispatched {
  at::Tensor rows, end_offsets, recv_map, recv_weights, send_map, splits;
  at::Tensor overflow;  // of the fixed form; else empty
  at::Tensor counted;   // where wanted; else empty

  std::vector<at::Tensor> as_list() const {
    return {rows, end_offsets, recv_map, recv_weights, send_map, splits, overflow, counted};
  }
};

Dispatched dispatch_cpu(const DispatchInputs& in);
Dispatched dispatch_cuda(const DispatchInputs& in);

}  // namespace moetuner
