#include "moetuner/count_routing.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>

#ifdef MOETUNER_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace moetuner {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

void check_ids(const at::Tensor& ids, const char* name, const at::Tensor& load) {
  TORCH_CHECK_VALUE(
      ids.dim() == 2, "count_routing: ", name, " must be [tokens, top_k], got ", ids.sizes());
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kInt || ids.scalar_type() == at::kLong,
                   "count_routing: ",
                   name,
                   " must be int32 or int64, got ",
                   ids.scalar_type());
  TORCH_CHECK_VALUE(ids.is_contiguous(),
                    "count_routing: ",
                    name,
                    " must be contiguous, got strides ",
                    ids.strides());
  TORCH_CHECK_VALUE(ids.device() == load.device(),
                    "count_routing: ",
                    name,
                    " is on ",
                    ids.device(),
                    ", load on ",
                    load.device());
}

void check_counter(const at::Tensor& counter,
                   const char* name,
                   at::IntArrayRef sizes,
                   at::Device device) {
  TORCH_CHECK_TYPE(counter.scalar_type() == at::kLong,
                   "count_routing: ",
                   name,
                   " must be int64, got ",
                   counter.scalar_type());
  TORCH_CHECK_VALUE(counter.sizes() == sizes,
                    "count_routing: ",
                    name,
                    " must be ",
                    sizes,
                    ", got ",
                    counter.sizes());
  TORCH_CHECK_VALUE(counter.is_contiguous(),
                    "count_routing: ",
                    name,
                    " must be contiguous, got strides ",
                    counter.strides());
  TORCH_CHECK_VALUE(counter.device() == device,
                    "count_routing: ",
                    name,
                    " is on ",
                    counter.device(),
                    ", load on ",
                    device);
}

void check(const at::Tensor& topk_ids,
           const at::Tensor& load,
           const OptionalTensor& coactivation,
           const OptionalTensor& previous_topk_ids,
           const OptionalTensor& transitions) {
  TORCH_CHECK_VALUE(load.dim() == 1, "count_routing: load must be [experts], got ", load.sizes());
  const std::int64_t num_experts = load.size(0);
  check_counter(load, "load", {num_experts}, load.device());
  check_ids(topk_ids, "topk_ids", load);
  TORCH_CHECK_VALUE(topk_ids.size(1) > 0, "count_routing: topk_ids has no experts per token");
  if (coactivation) {
    check_counter(*coactivation, "coactivation", {num_experts, num_experts}, load.device());
  }
  TORCH_CHECK_VALUE(previous_topk_ids.has_value() == transitions.has_value(),
                    "count_routing: previous_topk_ids and transitions go together, got ",
                    previous_topk_ids ? "only previous_topk_ids" : "only transitions");
  if (!transitions) return;
  check_counter(*transitions, "transitions", {num_experts, num_experts}, load.device());
  check_ids(*previous_topk_ids, "previous_topk_ids", load);
  TORCH_CHECK_TYPE(previous_topk_ids->scalar_type() == topk_ids.scalar_type(),
                   "count_routing: previous_topk_ids must be ",
                   topk_ids.scalar_type(),
                   " like topk_ids, got ",
                   previous_topk_ids->scalar_type());
  TORCH_CHECK_VALUE(previous_topk_ids->size(0) == topk_ids.size(0),
                    "count_routing: previous_topk_ids must have ",
                    topk_ids.size(0),
                    " tokens like topk_ids, got ",
                    previous_topk_ids->size(0));
}

template <typename Id>
CountRoutingArgs<Id> pack(const at::Tensor& topk_ids,
                          const at::Tensor& load,
                          const OptionalTensor& coactivation,
                          const OptionalTensor& previous_topk_ids,
                          const OptionalTensor& transitions) {
  return {
      .topk_ids = topk_ids.const_data_ptr<Id>(),
      .previous_topk_ids = transitions ? previous_topk_ids->const_data_ptr<Id>() : nullptr,
      .load = load.mutable_data_ptr<std::int64_t>(),
      .coactivation = coactivation ? coactivation->mutable_data_ptr<std::int64_t>() : nullptr,
      .transitions = transitions ? transitions->mutable_data_ptr<std::int64_t>() : nullptr,
      .num_tokens = topk_ids.size(0),
      .top_k = topk_ids.size(1),
      .previous_top_k = transitions ? previous_topk_ids->size(1) : 0,
      .num_experts = load.size(0),
  };
}

void count_routing_cpu(const at::Tensor& topk_ids,
                       at::Tensor load,
                       OptionalTensor coactivation,
                       const OptionalTensor& previous_topk_ids,
                       OptionalTensor transitions) {
  check(topk_ids, load, coactivation, previous_topk_ids, transitions);
  const auto run = [&]<typename Id>() {
    cpu::count_routing(pack<Id>(topk_ids, load, coactivation, previous_topk_ids, transitions));
  };
  topk_ids.scalar_type() == at::kInt ? run.operator()<std::int32_t>()
                                     : run.operator()<std::int64_t>();
}

#ifdef MOETUNER_WITH_CUDA
void count_routing_cuda(const at::Tensor& topk_ids,
                        at::Tensor load,
                        OptionalTensor coactivation,
                        const OptionalTensor& previous_topk_ids,
                        OptionalTensor transitions) {
  const c10::cuda::CUDAGuard guard(load.device());
  check(topk_ids, load, coactivation, previous_topk_ids, transitions);
  const auto run = [&]<typename Id>() {
    cuda::count_routing(pack<Id>(topk_ids, load, coactivation, previous_topk_ids, transitions),
                        c10::cuda::getCurrentCUDAStream());
  };
  topk_ids.scalar_type() == at::kInt ? run.operator()<std::int32_t>()
                                     : run.operator()<std::int64_t>();
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(moetuner, m) {
  m.def(
      "count_routing(Tensor topk_ids, Tensor(a!) load, Tensor(b!)? coactivation=None, "
      "Tensor? previous_topk_ids=None, Tensor(c!)? transitions=None) -> ()");
}

TORCH_LIBRARY_IMPL(moetuner, CPU, m) { m.impl("count_routing", &count_routing_cpu); }

#ifdef MOETUNER_WITH_CUDA
TORCH_LIBRARY_IMPL(moetuner, CUDA, m) { m.impl("count_routing", &count_routing_cuda); }
#endif

}  // namespace moetuner
