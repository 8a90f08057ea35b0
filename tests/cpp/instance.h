#pragma once

#include "moetuner/planning/search.h"
#include "moetuner/planning/tally.h"

#include <array>
#include <cstdint>
#include <vector>

namespace moetuner {

/// A small problem of made-up routing that owns its arrays.
///
/// Tokens prefer experts of one of a few themes, and some choices are padding.
struct Instance {
  std::int64_t num_tokens = 90;
  std::int64_t num_layers = 3;
  std::int64_t top_k = 3;
  std::int64_t num_experts = 12;
  std::int64_t num_ranks = 4;
  std::int64_t ranks_per_node = 2;
  std::int64_t num_scenarios = 2;
  std::uint64_t seed = 1;
  std::vector<double> rank_speeds = {1.0, 0.7, 1.2, 0.9};
  // One way slower, and some places faster; computing as measured, with launches.
  bool uneven = false;
  bool padding = true;

  std::vector<std::int16_t> topk_ids;
  std::vector<std::int64_t> scenario_begin;
  std::vector<std::int32_t> load;
  std::vector<std::uint8_t> active;
  std::vector<double> row_scale;
  std::vector<double> weight;
  std::vector<std::int64_t> token;
  std::vector<std::int32_t> home;

  /// Fills the arrays.
  void draw();

  Rates rates(WireRules wire) const;
  SearchProblem problem(WireRules wire, Homes homes, bool with_home) const;

  /// Ranks [L, P] that deal out experts and `spare` empty slots per rank in turn.
  std::vector<std::int32_t> dealt(std::int64_t spare) const;
  /// The experts of slots [L, P] with members at such ranks.
  std::vector<std::int32_t> slots_of(const std::vector<std::int32_t>& ranks) const;

  /// The price of every layer, [L], by the tally of each scenario: what a search must find.
  std::vector<double> priced(const std::vector<std::int32_t>& slots,
                             WireRules wire,
                             Homes homes,
                             ReplicaRule rule = ReplicaRule::kMoetuner) const;
};

/// Every wire that there is, and those that could be.
inline constexpr std::array kAllRules{WireRules{Rows::kPerRank, Crossing::kGateway, Hops::kInTurn},
                                      WireRules{Rows::kPerRank, Crossing::kGateway},
                                      WireRules{Rows::kPerRank, Crossing::kDirect},
                                      WireRules{Rows::kPerExpert, Crossing::kDirect},
                                      WireRules{Rows::kToAll, Crossing::kRing}};

/// Options of a short search.
SearchOptions short_search(std::int64_t proposals, std::int64_t sweeps, int num_threads);

}  // namespace moetuner
