#pragma once

#include "routing_args.h"

#include <string>

namespace moetuner {

constexpr const char* kDispatchOp = "dispatch";

struct DispatchInputs {
  const at::Tensor& x;
  const at::Tensor& topk_ids;
  const at::Tensor& weights;
  const at::Tensor& candidates;
  const at::Tensor& num_candidates;
  std::int64_t slots_per_rank;
  const std::string& group_name;
  std::int64_t ranks_per_node;  // 0: all ranks share a node
  const OptionalTensor& counters;
  std::int64_t capacity = 0;  // of the fixed form; 0: exact
  std::int64_t max_rows = 0;

  bool fixed() const { return capacity > 0; }
};

struct Dispatched {
  at::Tensor rows, end_offsets, recv_map, recv_weights, send_map, splits;
  at::Tensor overflow;  // of the fixed form
};

Dispatched dispatch_cpu(const DispatchInputs& in);
Dispatched dispatch_cuda(const DispatchInputs& in);

}  // namespace moetuner
