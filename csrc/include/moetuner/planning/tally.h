#pragma once

#include "moetuner/planning/replica_rule.h"
#include "moetuner/planning/wire.h"

#include <cstdint>
#include <functional>

namespace moetuner {

/// Counts rows on every rank and link, token by token.
///
/// T tokens, L layers, K experts per token, G ranks, N nodes, P slots, Q groups of tokens. Slot p
/// lives on rank p / (P / G), rank g on node g / ranks_per_node. Counts are in units of 1 / scale
/// rows (`tally_scale`), so that expectations over homes stay integers. Outputs must be zeroed.
///
/// dedup, from home h to the set D of ranks that compute the token's experts:
///
///     h ---rank link---> d                  for each d in D on the node of h
///     h ---node link---> gateway ---> d     once per other node, then d != gateway inside it
///
/// The gateway has the local index of h. per_expert: rank links inside the node, node links alone
/// between nodes, one row per expert. allgather: dedup with D = all ranks. The way back runs the
/// other way round, to the home or, with `follow`, to the rank of the token's first expert.
///
/// Replicas are chosen by `replica_rule`. Where it asks for rows, a token's row is its place among
/// the tokens of its group and home; tokens without recorded homes are dealt out to the ranks in
/// turn. So dealt, they also show how many experts are active: expectations would count every
/// replica that any home may choose.
struct TallyArgs {
  const std::int16_t* topk_ids;      // [T, L, K], ids outside [0, E) are padding
  const std::int32_t* slot_experts;  // [L, P], -1: empty slot
  const std::int16_t* home_rank;     // [T], for recorded homes; else null
  const std::int32_t* group;         // [T], in [0, Q)
  const std::int32_t* rank_slots;    // [L, G, E], what kSglangStatic picks; null: see `static_slot`

  std::int64_t num_tokens;
  std::int64_t num_layers;
  std::int64_t top_k;
  std::int64_t num_experts;
  std::int64_t num_slots;
  std::int64_t num_ranks;
  std::int64_t ranks_per_node;
  std::int64_t num_groups;
  WireRules wire;
  Homes homes;
  ReplicaRule replica_rule;
  int num_threads;                // 0: all cores
  std::function<void()> between;  // called before each piece of work; what it throws ends the tally

  std::int64_t* slot_rows;           // [Q, L, P], (token, expert) pairs computed in the slot
  std::int64_t* slot_used;           // [Q, L, P], the same of dealt tokens; null unless `deals_out`
  std::int64_t* rank_egress;         // [Q, L, G], dispatch rows leaving a rank inside its node
  std::int64_t* rank_ingress;        // [Q, L, G]
  std::int64_t* node_egress;         // [Q, L, N], dispatch rows leaving a node
  std::int64_t* node_ingress;        // [Q, L, N]
  std::int64_t* return_rank_egress;  // [Q, L, G], the same on the way back
  std::int64_t* return_rank_ingress;  // [Q, L, G]
  std::int64_t* return_node_egress;   // [Q, L, N]
  std::int64_t* return_node_ingress;  // [Q, L, N]
  std::int64_t* distinct_ranks;       // [Q, L], sum over tokens of |D|, whatever the wire
  std::int64_t* distinct_nodes;       // [Q, L]
  std::int64_t* remote_ranks;         // [Q, L], sum over tokens of |D without the home|
  std::int64_t* remote_nodes;         // [Q, L]
  std::int64_t* traffic;              // [L, G, G], dispatch rows from home to computing rank
};

/// Units per row: the number of ranks where a home is uniform, else 1.
std::int64_t tally_scale(Homes homes, std::int64_t num_ranks);

/// Whether `slot_used` says something else than `slot_rows`.
bool deals_out(Homes homes, ReplicaRule rule);

/// Fills the outputs. Throws std::invalid_argument when an expert that a token chose has no slot.
void tally_routing(const TallyArgs& args);

}  // namespace moetuner
