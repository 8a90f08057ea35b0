#include "dispatch_forward.h"

#include <algorithm>

// What `dispatch` refuses.

namespace moetuner {
namespace {

void check_table(const char* name, const at::Tensor& table, std::int64_t dim, const at::Tensor& x) {
  TORCH_CHECK_VALUE(table.dim() == dim,
                    kDispatchOp,
                    ": ",
                    name,
                    dim == 2 ? " must be [experts, replicas]" : " must be [experts]",
                    ", got ",
                    table.sizes());
  TORCH_CHECK_TYPE(table.scalar_type() == at::kInt,
                   kDispatchOp,
                   ": ",
                   name,
                   " must be int32, got ",
                   table.scalar_type());
  check_contiguous(kDispatchOp, name, table);
  check_device(kDispatchOp, name, table, "x", x);
}

void check_tensors(const DispatchInputs& in) {
  const at::Tensor& x = in.x;
  const at::Tensor& ids = in.topk_ids;
  const at::Tensor& weights = in.weights;
  const at::Tensor& candidates = in.candidates;
  const at::Tensor& num_candidates = in.num_candidates;
  check_tokens(kDispatchOp, x, ids);
  TORCH_CHECK_VALUE(weights.sizes() == ids.sizes(),
                    kDispatchOp,
                    ": topk_weights must be ",
                    ids.sizes(),
                    " like topk_ids, got ",
                    weights.sizes());
  TORCH_CHECK_TYPE(weights.scalar_type() == at::kFloat,
                   kDispatchOp,
                   ": topk_weights must be float32, got ",
                   weights.scalar_type());
  check_contiguous(kDispatchOp, "topk_weights", weights);
  check_device(kDispatchOp, "topk_weights", weights, "x", x);
  check_table("candidates", candidates, 2, x);
  check_table("num_candidates", num_candidates, 1, x);
  TORCH_CHECK_VALUE(candidates.size(0) == num_candidates.size(0) && candidates.size(1) > 0,
                    kDispatchOp,
                    ": candidates must be [",
                    num_candidates.size(0),
                    ", replicas] as num_candidates says, got ",
                    candidates.sizes());
}

/// 0 where none is given.
std::int64_t given_size(const char* name, const std::optional<c10::SymInt>& size) {
  if (!size) return 0;
  const std::int64_t value = size->expect_int();
  TORCH_CHECK_VALUE(value > 0, kDispatchOp, ": ", name, " must be positive, got ", value);
  return value;
}

/// What the way says, or else the caller.
std::int64_t ranks_per_node(const DispatchInputs& in, const Path& path) {
  const std::int64_t num_ranks = path.num_ranks();
  const std::int64_t told = in.ranks_per_node == 0 ? num_ranks : in.ranks_per_node;
  TORCH_CHECK_VALUE(told > 0 && num_ranks % told == 0,
                    kDispatchOp,
                    ": ranks_per_node must divide the group's ",
                    num_ranks,
                    " ranks, got ",
                    in.ranks_per_node);
  if (!path.crosses_nodes()) return told;
  const std::int64_t in_node = path.last().num_ranks();
  TORCH_CHECK_VALUE(in.ranks_per_node == 0 || told == in_node,
                    kDispatchOp,
                    ": ranks_per_node must be ",
                    in_node,
                    " as the group inside a node has, got ",
                    in.ranks_per_node);
  return in_node;
}

}  // namespace

Sizes check_dispatch(const DispatchInputs& in, const Path& path) {
  TORCH_CHECK_VALUE(in.slots_per_rank > 0,
                    kDispatchOp,
                    ": slots_per_rank must be positive, got ",
                    in.slots_per_rank);
  TORCH_CHECK_VALUE(in.capacity.has_value() == in.max_rows.has_value(),
                    kDispatchOp,
                    ": capacity and max_rows go together, got only ",
                    in.capacity ? "capacity" : "max_rows");
  check_tensors(in);
  const std::int64_t per_node = ranks_per_node(in, path);
  const Sizes sizes{.num_ranks = path.num_ranks(),
                    .ranks_per_node = per_node,
                    .crosses_nodes = path.crosses_nodes(),
                    .capacity = given_size("capacity", in.capacity),
                    .max_rows = given_size("max_rows", in.max_rows)};
  // Kernels count the choices of all tokens, here and where they arrive, in 32 bits.
  const std::int64_t top_k = in.topk_ids.size(1);
  TORCH_CHECK_VALUE(in.topk_ids.numel() <= kMaxRows && sizes.max_rows <= kMaxRows,
                    kDispatchOp,
                    ": ",
                    std::max(in.topk_ids.numel(), sizes.max_rows),
                    " rows do not fit into the int32 maps");
  TORCH_CHECK_VALUE(sizes.capacity <= kMaxRows / (sizes.num_ranks * top_k),
                    kDispatchOp,
                    ": capacity ",
                    sizes.capacity,
                    " of ",
                    sizes.num_ranks,
                    " ranks with ",
                    top_k,
                    " experts per token does not fit into the int32 maps");
  return sizes;
}

}  // namespace moetuner
