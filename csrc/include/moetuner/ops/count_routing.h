#pragma once

#include <cstdint>

struct CUstream_st;  // cudaStream_t, without needing CUDA's headers

namespace moetuner {

/// Adds the routing of one layer to persistent counters, on the device that holds them.
///
/// T tokens, K (J) experts per token at this (the previous) layer, E experts. Ids outside [0, E)
/// are padding on every device. Counters are added to, never cleared.
template <typename Id>
struct CountRoutingArgs {
  const Id* topk_ids;           // [T, K]
  const Id* previous_topk_ids;  // [T, J], the same tokens at the previous layer; or null
  std::int64_t* load;           // [E], tokens that chose e
  std::int64_t* coactivation;   // [E, E], tokens that chose both, diagonal = load; or null
  std::int64_t* transitions;    // [E, E], chose a at the previous layer and b at this; or null
  std::int64_t num_tokens;
  std::int64_t top_k;
  std::int64_t previous_top_k;
  std::int64_t num_experts;
};

namespace cpu {
template <typename Id>
void count_routing(const CountRoutingArgs<Id>& args);
}

namespace cuda {
/// Enqueued on `stream`; integer atomics, so the counts are exact whatever the order.
template <typename Id>
void count_routing(const CountRoutingArgs<Id>& args, CUstream_st* stream);
}  // namespace cuda

}  // namespace moetuner
