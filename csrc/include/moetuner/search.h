#pragma once

#include <cstdint>

namespace moetuner {

/// What one layer's rows cost when homes are uniform, in seconds; see docs/planning.md.
///
/// The first group is the modelled time of the evaluator. The smooth group is added to it in the
/// search alone: maxima have plateaus, and what they leave open is decided by even loads and few
/// copies.
struct SearchWeights {
  double row_compute;      // arithmetic of one row
  double expert_compute;   // reading one active expert's weights
  double rank_row;         // one row over a rank link, there and back
  double node_row;         // one row over a node's link, there and back
  double rank_latency;     // both directions, where anything moves inside a node
  double node_latency;     // both directions, where anything moves between nodes
  double smooth_peak;      // one row on the fullest rank, in a scenario
  double smooth_pooled;    // the same, all scenarios together
  double smooth_variance;  // (mean square of the ranks' rows) / (mean rows), in a scenario
  double smooth_rank_hit;  // one (token, distinct rank)
  double smooth_node_hit;  // one (token, distinct node)
};

/// Annealed swaps in every layer; uniform homes do not couple layers.
///
/// Tokens with a home need no row to it. With `follow` a token goes on from the rank of its first
/// expert: even layers, then odd ones are searched while their neighbours stand still, `sweeps`
/// times, ever cooler.
///
/// T tokens sorted by scenario, L layers, K experts per token, P slots of which some hold the
/// number of no expert (>= E: empty slots), G ranks, S scenarios. Rows of scenario s count
/// row_scale[s] times, its seconds weight[s].
struct SearchArgs {
  const std::int16_t* topk_ids;        // [T, L, K], other ids than experts are padding
  const std::int64_t* scenario_begin;  // [S + 1], into the tokens
  const std::int32_t* load;            // [S, L, E], rows of each expert
  const std::uint8_t* active;          // [S, L, E], 1: the expert has rows in such a batch
  const double* row_scale;             // [S]
  const double* weight;                // [S]
  const double* rank_speed;            // [G]
  std::int64_t num_tokens;
  std::int64_t num_layers;
  std::int64_t top_k;
  std::int64_t num_experts;
  std::int64_t num_slots;  // P = G * slots per rank
  std::int64_t num_ranks;
  std::int64_t ranks_per_node;
  std::int64_t num_scenarios;
  bool dedup;   // one row per distinct rank, else one per expert
  bool gather;  // rows go everywhere: only loads count; not with dedup
  SearchWeights weights;
  const std::int32_t* stay_rank;  // [L, E], where experts are now; null: nowhere
  double move_seconds;            // what every expert that is elsewhere then adds

  const std::int32_t* home;  // [T], rank of each token at the first layer; null: uniform homes
  bool follow;
  double dispatch_share;  // of a row's bytes, on the way out; for homes that follow
  std::int64_t sweeps;    // with homes

  std::int64_t proposals;    // per layer while it cools, and at most as many afterwards
  double start_temperature;  // share of the median |change| of a random swap
  double end_temperature;
  std::uint64_t seed;
  int num_threads;           // 0: all cores
  double seconds;            // stop by then
  const std::int32_t* stop;  // [1], nonzero: stop now

  std::int32_t* rank_of;  // [L, P], rank of each expert and empty slot; start in, best out
  double* cost;           // [L], search cost of rank_of
};

/// Improves every layer of `rank_of`. With uniform homes it never returns a worse search cost than
/// it was given.
///
/// The result depends on the arguments alone, not on the threads, as long as neither `seconds` nor
/// `stop` ends it.
void search_layers(const SearchArgs& args);

}  // namespace moetuner
