#pragma once

#include "moetuner/ops/count_routing.h"
#include "moetuner/ops/ids.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <optional>

// Checks and packing of what every op that reads routing takes. `op` is named in each error.

namespace moetuner {

using OptionalTensor = std::optional<at::Tensor>;

/// Persistent counters of one layer; see count_routing.
struct Counters {
  OptionalTensor load;
  OptionalTensor coactivation;
  OptionalTensor previous_topk_ids;
  OptionalTensor transitions;
};

inline void check_contiguous(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.is_contiguous(),
                    op,
                    ": ",
                    name,
                    " must be contiguous, got strides ",
                    tensor.strides());
}

inline void check_device(const char* op,
                         const char* name,
                         const at::Tensor& tensor,
                         const char* other_name,
                         const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.device() == other.device(),
                    op,
                    ": ",
                    name,
                    " is on ",
                    tensor.device(),
                    ", ",
                    other_name,
                    " on ",
                    other.device());
}

/// More experts per token, and the kernels' 32-bit count of their pairs overflows.
constexpr std::int64_t kMaxTopK = 32768;

/// On CPUs; on CUDA the kernel that reads such an id refuses it, as nobody may wait for ids.
inline void check_narrow(const char* op, const char* name, const at::Tensor& ids) {
  if (!ids.is_cpu() || ids.scalar_type() != at::kLong) return;
  const auto* first = ids.const_data_ptr<std::int64_t>();
  const auto* last = first + ids.numel();
  const auto* found = std::find_if(first, last, [](std::int64_t id) {
    bool wide = false;
    narrow_id(id, wide);
    return wide;
  });
  TORCH_CHECK_VALUE(found == last,
                    op,
                    ": ",
                    name,
                    " must be within int32, got ",
                    *found,
                    " for token ",
                    (found - first) / ids.size(1),
                    ": -1 is padding");
}

/// int32 or int64 [tokens, top_k], at least one expert per token, all within int32.
inline void check_ids(const char* op, const char* name, const at::Tensor& ids) {
  TORCH_CHECK_VALUE(ids.dim() == 2, op, ": ", name, " must be [tokens, top_k], got ", ids.sizes());
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kInt || ids.scalar_type() == at::kLong,
                   op,
                   ": ",
                   name,
                   " must be int32 or int64, got ",
                   ids.scalar_type());
  TORCH_CHECK_VALUE(ids.size(1) > 0, op, ": ", name, " has no experts per token");
  TORCH_CHECK_VALUE(ids.size(1) <= kMaxTopK,
                    op,
                    ": ",
                    name,
                    " may have at most ",
                    kMaxTopK,
                    " experts per token, got ",
                    ids.size(1));
  check_contiguous(op, name, ids);
  check_narrow(op, name, ids);
}

/// Of an int32 map of rows.
constexpr std::int64_t kMaxRows = std::numeric_limits<std::int32_t>::max();

/// Rows `x` [tokens, hidden] of a dtype that travels, and `topk_ids` of the same tokens beside it.
inline void check_tokens(const char* op, const at::Tensor& x, const at::Tensor& topk_ids) {
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x must be [tokens, hidden], got ", x.sizes());
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf ||
                       type == at::kFloat8_e4m3fn || type == at::kFloat8_e5m2,
                   op,
                   ": x must be float32, bfloat16, float16, float8_e4m3fn or float8_e5m2, got ",
                   type);
  check_contiguous(op, "x", x);
  check_ids(op, "topk_ids", topk_ids);
  check_device(op, "topk_ids", topk_ids, "x", x);
  TORCH_CHECK_VALUE(topk_ids.size(0) == x.size(0),
                    op,
                    ": topk_ids must have ",
                    x.size(0),
                    " tokens like x, got ",
                    topk_ids.size(0));
}

inline void check_counter(const char* op,
                          const char* name,
                          const at::Tensor& counter,
                          at::IntArrayRef sizes) {
  TORCH_CHECK_TYPE(counter.scalar_type() == at::kLong,
                   op,
                   ": ",
                   name,
                   " must be int64, got ",
                   counter.scalar_type());
  TORCH_CHECK_VALUE(
      counter.sizes() == sizes, op, ": ", name, " must be ", sizes, ", got ", counter.sizes());
  check_contiguous(op, name, counter);
}

/// Counters for `topk_ids`, which is checked already.
inline void check_counters(const char* op, const at::Tensor& topk_ids, const Counters& counters) {
  const auto& [load, coactivation, previous, transitions] = counters;
  if (!load) {
    TORCH_CHECK_VALUE(!coactivation && !previous && !transitions,
                      op,
                      ": coactivation and transitions are counted beside load, got no load");
    return;
  }
  TORCH_CHECK_VALUE(load->dim() == 1, op, ": load must be [experts], got ", load->sizes());
  const std::int64_t num_experts = load->size(0);
  check_counter(op, "load", *load, {num_experts});
  check_device(op, "topk_ids", topk_ids, "load", *load);
  if (coactivation) {
    check_counter(op, "coactivation", *coactivation, {num_experts, num_experts});
    check_device(op, "coactivation", *coactivation, "load", *load);
  }
  TORCH_CHECK_VALUE(previous.has_value() == transitions.has_value(),
                    op,
                    ": previous_topk_ids and transitions go together, got ",
                    previous ? "only previous_topk_ids" : "only transitions");
  if (!transitions) return;
  check_counter(op, "transitions", *transitions, {num_experts, num_experts});
  check_device(op, "transitions", *transitions, "load", *load);
  check_ids(op, "previous_topk_ids", *previous);
  check_device(op, "previous_topk_ids", *previous, "load", *load);
  TORCH_CHECK_TYPE(previous->scalar_type() == topk_ids.scalar_type(),
                   op,
                   ": previous_topk_ids must be ",
                   topk_ids.scalar_type(),
                   " like topk_ids, got ",
                   previous->scalar_type());
  TORCH_CHECK_VALUE(previous->size(0) == topk_ids.size(0),
                    op,
                    ": previous_topk_ids must have ",
                    topk_ids.size(0),
                    " tokens like topk_ids, got ",
                    previous->size(0));
}

/// Nothing is counted where there is no load.
template <typename Id>
CountRoutingArgs<Id> pack(const at::Tensor& topk_ids, const Counters& counters) {
  const auto& [load, coactivation, previous, transitions] = counters;
  if (!load) return {};
  return {
      .topk_ids = topk_ids.const_data_ptr<Id>(),
      .previous_topk_ids = transitions ? previous->const_data_ptr<Id>() : nullptr,
      .load = load->mutable_data_ptr<std::int64_t>(),
      .coactivation = coactivation ? coactivation->mutable_data_ptr<std::int64_t>() : nullptr,
      .transitions = transitions ? transitions->mutable_data_ptr<std::int64_t>() : nullptr,
      .num_tokens = topk_ids.size(0),
      .top_k = topk_ids.size(1),
      .previous_top_k = transitions ? previous->size(1) : 0,
      .num_experts = load->size(0),
  };
}

/// Calls `run<Id>()` for the integer type of `ids`.
template <typename Run>
void with_id_type(const at::Tensor& ids, const Run& run) {
  ids.scalar_type() == at::kInt ? run.template operator()<std::int32_t>()
                                : run.template operator()<std::int64_t>();
}

}  // namespace moetuner
