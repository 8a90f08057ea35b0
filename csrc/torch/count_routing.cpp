#include "routing_args.h"

#include <torch/library.h>

#ifdef MOETUNER_WITH_CUDA
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace moetuner {
namespace {

constexpr const char* kOp = "count_routing";

void count_routing_cpu(const at::Tensor& topk_ids,
                       at::Tensor load,
                       OptionalTensor coactivation,
                       const OptionalTensor& previous_topk_ids,
                       OptionalTensor transitions) {
  const Counters counters{load, coactivation, previous_topk_ids, transitions};
  check_ids(kOp, "topk_ids", topk_ids);
  check_counters(kOp, topk_ids, counters);
  with_id_type(topk_ids, [&]<typename Id>() { cpu::count_routing(pack<Id>(topk_ids, counters)); });
}

#ifdef MOETUNER_WITH_CUDA
void count_routing_cuda(const at::Tensor& topk_ids,
                        at::Tensor load,
                        OptionalTensor coactivation,
                        const OptionalTensor& previous_topk_ids,
                        OptionalTensor transitions) {
  const c10::DeviceGuard guard(load.device());
  const Counters counters{load, coactivation, previous_topk_ids, transitions};
  check_ids(kOp, "topk_ids", topk_ids);
  check_counters(kOp, topk_ids, counters);
  with_id_type(topk_ids, [&]<typename Id>() {
    cuda::count_routing(pack<Id>(topk_ids, counters), c10::cuda::getCurrentCUDAStream());
  });
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
