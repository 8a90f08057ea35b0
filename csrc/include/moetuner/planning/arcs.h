#pragma once

#include "moetuner/planning/price.h"
#include "moetuner/planning/wire.h"

#include <cstdint>

namespace moetuner {

/// What one step from a layer to the next costs, from the rows between ranks.
enum class ArcCost {
  kExchange,     // the price of a dispatch; node_rows say what crosses to nodes
  kSlowestPair,  // slowest pair of ranks, rows * link_seconds
  kRemote,       // rows that change ranks
};

/// The cheapest way to line up every state of a layer with every state of the next one.
///
/// A state is a placement of one layer up to names: E experts on G ranks in nodes of
/// `ranks_per_node`. P states, A ways to rename ranks that leave the topology as it is, B batches.
/// Rows start on the rank of expert f at this layer and visit ranks of the next layer's state.
struct ArcArgs {
  const std::int32_t* rank_of;  // [P, E]
  const double* rank_rows;      // [B, P, E, G], rows of tokens that start with f to each rank
  const double* node_rows;      // [B, P, E, N], the same to each node (kExchange)
  const std::int32_t* rename;   // [A, G], new name of each rank of the next layer
  const double* link_seconds;   // [G, G], for kSlowestPair
  const double* weight;         // [B]

  std::int64_t num_batches;
  std::int64_t num_states;
  std::int64_t num_experts;
  std::int64_t num_ranks;
  std::int64_t ranks_per_node;
  std::int64_t num_renames;
  ArcCost cost;
  Crossing crossing;       // for kExchange
  LinkRates dispatch;      // for kExchange
  LinkFactors rank_links;  // for kExchange, [G]; renamings must leave them as they are
  LinkFactors node_links;  // for kExchange, [N]
  int num_threads;         // 0: all cores

  double* best;           // [P, P], weighted sum over batches
  std::int32_t* renamed;  // [P, P], the renaming that reaches it, the first of several
};

/// Fills the outputs.
void cheapest_arcs(const ArcArgs& args);

}  // namespace moetuner
