#pragma once

#include "moetuner/search.h"
#include "scenario_costs.h"
#include "token_sets.h"

#include <cstdint>
#include <vector>

namespace moetuner {

/// One layer of a search: where its experts are, what that costs, what a swap would cost.
///
/// Members are the experts and, with numbers from E on, the empty slots.
class LayerSearch {
 public:
  LayerSearch(const SearchArgs& args, std::int64_t layer);

  double cost() const { return cost_; }
  const std::vector<std::int32_t>& ranks() const { return rank_of_; }
  /// Rows of a member over all scenarios.
  double load(std::int64_t member) const { return total_load_[member]; }

  /// The cost after members `a` and `b`, on different ranks, change places.
  ///
  /// Must be followed by `accept` or `reject`.
  double propose(std::int64_t a, std::int64_t b);
  void accept();
  void reject();

  /// Starts again from these ranks.
  void place(const std::vector<std::int32_t>& rank_of);

 private:
  std::int64_t node_of(std::int64_t rank) const { return rank / args_.ranks_per_node; }
  void choose_tokens(std::int64_t layer);
  void fill_sets(std::int64_t rank);
  void fill_node_sets(std::int64_t node);
  bool moved(std::int64_t member, std::int64_t rank) const {
    return stay_rank_ != nullptr && member < args_.num_experts && stay_rank_[member] != rank;
  }
  double price() { return costs_.price() + args_.move_seconds * static_cast<double>(num_moved_); }
  void move_rows(std::int64_t rank, std::int64_t out, std::int64_t in);

  const SearchArgs& args_;
  const std::int64_t num_nodes_;
  const std::int64_t num_scenarios_;
  const std::int32_t* stay_rank_;  // [E]
  TokenSets tokens_;
  std::vector<std::int32_t> load_;     // [P, S]
  std::vector<std::int32_t> active_;   // [P, S]
  std::vector<double> total_load_;     // [P]
  std::vector<std::int32_t> rank_of_;  // [P]
  ScenarioCosts costs_;
  std::vector<TokenSets::Place> rank_sets_;  // [G]
  std::vector<TokenSets::Place> node_sets_;  // [N]
  std::int64_t num_moved_ = 0;
  double cost_ = 0.0;

  // The swap that was proposed last.
  std::int64_t member_[2] = {0, 0};
  std::int64_t rank_[2] = {0, 0};
  std::int64_t moved_before_ = 0;
  double next_cost_ = 0.0;
};

}  // namespace moetuner
