#pragma once

#include <cstdint>
#include <functional>

namespace moetuner {

/// Counts of a routing trace. T tokens, L layers, K experts per token, E experts.
///
/// Ids outside [0, E) are padding and count nowhere. Outputs are overwritten.
struct StatisticsArgs {
  const std::int16_t* topk_ids;  // [T, L, K]
  std::int64_t* load;            // [L, E], tokens that chose e
  std::int64_t* coactivation;    // [L, E, E], tokens that chose both; diagonal = load; or null
  std::int64_t* transitions;     // [L - 1, E, E], chose a at l and b at l + 1; or null
  std::int64_t num_tokens;
  std::int64_t num_layers;
  std::int64_t top_k;
  std::int64_t num_experts;
  int num_threads;                     // 0: all cores
  std::function<void()> between = {};  // called before each layer; what it throws ends the count
};

/// Fills the outputs; layers are shared out over threads, so the result never depends on them.
void count_statistics(const StatisticsArgs& args);

}  // namespace moetuner
