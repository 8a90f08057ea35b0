#pragma once

#include "moetuner/planning/price.h"
#include "moetuner/planning/replica_rule.h"
#include "moetuner/planning/wire.h"

#include <cmath>
#include <cstdint>

namespace moetuner {

/// What a search adds to the price of a layer, in seconds; see docs/planning.md.
///
/// Maxima have plateaus: what they leave open is decided by even loads and few copies.
struct Smoothing {
  double peak;         // one row on the fullest rank, in a scenario
  double pooled;       // the same, all scenarios together
  double variance;     // (mean square of the ranks' rows) / (mean rows), in a scenario
  double rank_copies;  // one (token, distinct rank)
  double node_copies;  // one (token, distinct node)

  /// The same where nodes of so many ranks take the place of ranks: see `Rates::of_nodes`.
  Smoothing of_nodes(std::int64_t ranks_per_node) const {
    const auto ranks = static_cast<double>(ranks_per_node);
    return {peak / ranks, pooled / ranks, variance / ranks, 0.0, node_copies};
  }
};

/// What both searches look at.
///
/// T tokens sorted by scenario, L layers, K experts per token, E experts, G ranks, S scenarios.
/// Rows of scenario s count row_scale[s] times, its seconds weight[s].
struct SearchProblem {
  const std::int16_t* topk_ids;        // [T, L, K], other ids than experts are padding
  const std::int64_t* scenario_begin;  // [S + 1], into the tokens
  const std::int32_t* load;            // [S, L, E], rows of each expert
  const std::uint8_t* active;          // [S, L, E], 1: the expert has rows in such a batch
  const double* row_scale;             // [S]
  const double* weight;                // [S]
  const std::int64_t* token;           // [T], index of each token in its trace
  const std::int32_t* home;            // [T], rank at the first layer; null: uniform
  std::int64_t num_tokens;
  std::int64_t num_layers;
  std::int64_t top_k;
  std::int64_t num_experts;
  std::int64_t num_ranks;
  std::int64_t ranks_per_node;
  std::int64_t num_scenarios;
  WireRules wire;
  bool follow;  // tokens go on from the rank of their first expert
  LayerPrice price;
  Smoothing smoothing;
  // What `search_layers` alone knows:
  const std::int32_t* stay_rank;  // [L, E], where experts are now; null: nowhere
  double move_seconds;            // what every expert that is elsewhere then adds
  // What `search_tokens` alone knows:
  ReplicaRule replica_rule;
  bool replicas;  // slots that can be spared may take copies
};

/// How long and how hot a search is.
struct SearchOptions {
  std::int64_t proposals;    // per layer
  std::int64_t sweeps;       // turns of even and odd layers, where they matter to each other
  double start_temperature;  // share of the median |change| of a random move
  double end_temperature;
  std::uint64_t seed;
  int num_threads;          // 0: all cores
  double seconds;           // stop by then
  bool fills_time = false;  // layers that stand alone get as many proposals as there is time for

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

/// Where a search begins, and what it leaves behind; P slots.
struct SearchState {
  std::int32_t* places;  // [L, P], start in, best out; each search says of what
  std::int64_t num_slots;
  double* cost;              // [L], search cost of what was found
  const std::int32_t* stop;  // [1], nonzero: stop now
};

/// Annealed swaps in every layer; uniform homes do not couple layers.
///
/// `places` are the ranks of the E experts and then of the empty slots. Tokens with a home need no
/// row to it; then rows are one per rank, through gateways. With `follow` a token goes on from the
/// rank of its first expert: even layers, then odd ones are searched while their neighbours stand
/// still, `sweeps` times, ever cooler.
///
/// With uniform homes it never returns a worse search cost than it was given. The result depends on
/// the arguments alone, not on the threads, as long as neither `seconds` nor `stop` ends it.
void search_layers(const SearchProblem& problem,
                   const SearchOptions& options,
                   const SearchState& state);

/// A search that walks every token: homes that follow or are recorded, and replicas.
///
/// `places` are the experts of slots, -1: empty. Tokens travel by the rules of `tally_routing` from
/// the home that is given for their first layer. With `follow` layers take turns as above, and a
/// layer's cost holds its way to the next one too.
///
/// Every expert keeps a slot and no rank holds one twice. The result depends on the arguments
/// alone, not on the threads, unless `seconds` or `stop` ends it. It may be worse than the start.
void search_tokens(const SearchProblem& problem,
                   const SearchOptions& options,
                   const SearchState& state);

}  // namespace moetuner
