#pragma once

#include "launch.cuh"
#include "moetuner/ops/count_routing.h"
#include "moetuner/ops/ids.h"

#include <cuda_runtime.h>

namespace moetuner::cuda {

__device__ inline void add_to(std::int64_t* counter, unsigned long long value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), value);
}

/// The operation with its argument, as `read_id` tells them.
struct IdNames {
  const char *here, *before;
};

/// Adds token `t`'s pairs to the tables, lane i of the warp taking the i-th of
///
///     [ coactivation: K x K ][ transitions: J x K ]
template <typename Id>
__device__ void count_pairs(const CountRoutingArgs<Id>& args,
                            std::int64_t t,
                            const IdNames& names) {
  const std::int64_t num_experts = args.num_experts;
  const auto valid = [&](std::int32_t id) { return id >= 0 && id < num_experts; };
  const int top_k = static_cast<int>(args.top_k);
  const int num_coactivation = args.coactivation ? top_k * top_k : 0;
  const int num_transitions = args.transitions ? static_cast<int>(args.previous_top_k) * top_k : 0;
  const auto here = [&](int k) { return read_id(args.topk_ids, t * top_k + k, names.here); };
  for (int i = lane_index(); i < num_coactivation; i += kWarp) {
    const std::int32_t a = here(i / top_k);
    const std::int32_t b = here(i % top_k);
    if (valid(a) && valid(b)) add_to(&args.coactivation[a * num_experts + b], 1);
  }
  for (int i = lane_index(); i < num_transitions; i += kWarp) {
    const std::int64_t before = t * args.previous_top_k + i / top_k;
    const std::int32_t a = read_id(args.previous_topk_ids, before, names.before);
    const std::int32_t b = here(i % top_k);
    if (valid(a) && valid(b)) add_to(&args.transitions[a * num_experts + b], 1);
  }
}

}  // namespace moetuner::cuda
