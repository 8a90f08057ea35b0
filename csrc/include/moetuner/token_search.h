#pragma once

#include "moetuner/search.h"
#include "moetuner/tally.h"

#include <cstdint>

namespace moetuner {

/// A search that walks every token: homes that follow or are recorded, and replicas.
///
/// T tokens sorted by scenario, L layers, K experts per token, P slots, G ranks, S scenarios.
/// Tokens travel by the rules of `tally_routing` from the home that is given for their first layer.
/// With `follow` a layer is searched while its neighbours stand still: even layers, then odd ones,
/// `sweeps` times.
struct TokenSearchArgs {
  const std::int16_t* topk_ids;        // [T, L, K], other ids than experts are padding
  const std::int64_t* scenario_begin;  // [S + 1], into the tokens
  const double* row_scale;             // [S], rows of a batch for each row of the scenario
  const double* weight;                // [S]
  const double* rank_speed;            // [G]
  const std::int32_t* home;            // [T], at the first layer
  const std::int64_t* token;           // [T], number by which replicas are picked
  std::int64_t num_tokens;
  std::int64_t num_layers;
  std::int64_t top_k;
  std::int64_t num_experts;
  std::int64_t num_slots;
  std::int64_t num_ranks;
  std::int64_t ranks_per_node;
  std::int64_t num_scenarios;
  Wire wire;
  bool follow;
  bool replicas;          // slots that can be spared may take copies
  SearchWeights weights;  // latencies, and link seconds there and back, as for `search_layers`
  double dispatch_share;  // of a row's bytes, on the way out

  std::int64_t proposals;  // per layer
  std::int64_t sweeps;
  double start_temperature;  // share of the median |change| of a random move
  double end_temperature;
  std::uint64_t seed;
  int num_threads;           // 0: all cores
  double seconds;            // stop by then
  const std::int32_t* stop;  // [1], nonzero: stop now

  std::int32_t* slot_experts;  // [L, P], -1: empty; start in, end of the search out
  double* cost;                // [L], search cost: the layer with the way to the next one
};

/// Every expert keeps a slot and no rank holds one twice. The result depends on the arguments
/// alone, not on the threads, unless `seconds` or `stop` ends it. It may be worse than the start.
void search_tokens(const TokenSearchArgs& args);

}  // namespace moetuner
