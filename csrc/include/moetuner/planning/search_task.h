#pragma once

#include <cmath>
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

/// What a search looks at and how long: shared by `search_layers` and `search_tokens`.
///
/// T tokens sorted by scenario, L layers, K experts per token, E experts, P slots, G ranks, S
/// scenarios. Rows of scenario s count row_scale[s] times, its seconds weight[s].
struct SearchTask {
  const std::int16_t* topk_ids;        // [T, L, K], other ids than experts are padding
  const std::int64_t* scenario_begin;  // [S + 1], into the tokens
  const double* row_scale;             // [S]
  const double* weight;                // [S]
  const double* rank_speed;            // [G]
  const std::int32_t* home;            // [T], rank at the first layer
  std::int64_t num_tokens;
  std::int64_t num_layers;
  std::int64_t top_k;
  std::int64_t num_experts;
  std::int64_t num_slots;  // P = G * slots per rank
  std::int64_t num_ranks;
  std::int64_t ranks_per_node;
  std::int64_t num_scenarios;
  bool follow;            // tokens go on from the rank of their first expert
  double dispatch_share;  // of a row's bytes, on the way out
  SearchWeights weights;

  std::int64_t proposals;    // per layer
  std::int64_t sweeps;       // turns of even and odd layers, where they matter to each other
  double start_temperature;  // share of the median |change| of a random move
  double end_temperature;
  std::uint64_t seed;
  int num_threads;           // 0: all cores
  double seconds;            // stop by then
  const std::int32_t* stop;  // [1], nonzero: stop now

  double* cost;  // [L], search cost of what was found

  /// Temperature after this share of the cooling, from 0 to 1.
  double temperature(double done) const {
    return start_temperature * std::pow(end_temperature / start_temperature, done);
  }
  /// The same of a sweep.
  double sweep_temperature(std::int64_t sweep) const {
    return temperature(sweeps > 1 ? static_cast<double>(sweep) / static_cast<double>(sweeps - 1)
                                  : 1.0);
  }
};

}  // namespace moetuner
