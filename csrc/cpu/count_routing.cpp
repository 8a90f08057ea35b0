#include "moetuner/ops/count_routing.h"

namespace moetuner::cpu {

template <typename Id>
void count_routing(const CountRoutingArgs<Id>& args) {
  const std::int64_t num_experts = args.num_experts;
  const auto valid = [&](Id id) { return id >= 0 && id < num_experts; };
  for (std::int64_t t = 0; t < args.num_tokens; ++t) {
    const Id* here = args.topk_ids + t * args.top_k;
    const Id* before =
        args.transitions ? args.previous_topk_ids + t * args.previous_top_k : nullptr;
    for (std::int64_t k = 0; k < args.top_k; ++k) {
      if (!valid(here[k])) continue;
      ++args.load[here[k]];
      for (std::int64_t j = 0; args.coactivation != nullptr && j < args.top_k; ++j) {
        if (valid(here[j])) ++args.coactivation[here[k] * num_experts + here[j]];
      }
      for (std::int64_t j = 0; args.transitions != nullptr && j < args.previous_top_k; ++j) {
        if (valid(before[j])) ++args.transitions[before[j] * num_experts + here[k]];
      }
    }
  }
}

template void count_routing(const CountRoutingArgs<std::int32_t>& args);
template void count_routing(const CountRoutingArgs<std::int64_t>& args);

}  // namespace moetuner::cpu
