#pragma once

#include "moetuner/planning/search.h"
#include "planning/cost/scenario_costs.h"
#include "planning/tally/token_sets.h"

#include <cstdint>
#include <optional>
#include <vector>

namespace moetuner {

/// What stands still around a layer while it is searched.
struct Surroundings {
  const std::int32_t* home = nullptr;        // [T], where tokens are; null: uniform
  const std::int32_t* next_ranks = nullptr;  // [P] of the next layer; null: nothing follows
};

/// One layer of a search: where its experts are, what that costs, what a swap would cost.
///
/// Members are the experts and, with numbers from E on, the empty slots.
class LayerSearch {
 public:
  LayerSearch(const SearchProblem& problem,
              const SearchState& state,
              std::int64_t layer,
              const Surroundings& around = {});

  double cost() const { return cost_; }
  /// The same without what it saves the next layer.
  double own_cost() const { return cost_ + saved_; }
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
  std::int64_t node_of(std::int64_t rank) const { return rank / problem_.ranks_per_node; }
  void choose_tokens(std::int64_t layer);
  void choose_homes(std::int64_t layer);
  void value_ends(std::int64_t layer);
  TokenSets::Rows rows_of(std::int64_t place) const;
  void leave_first_rows(std::int64_t place, std::int64_t out, std::int64_t in, std::int32_t* rows);
  void fill_sets(std::int64_t rank);
  void fill_node_sets(std::int64_t node);
  bool moved(std::int64_t member, std::int64_t rank) const {
    return stay_rank_ != nullptr && member < problem_.num_experts && stay_rank_[member] != rank;
  }
  double price() {
    return costs_.price() + problem_.move_seconds * static_cast<double>(num_moved_) - next_saved_;
  }
  void move_rows(std::int64_t rank, std::int64_t out, std::int64_t in);

  const SearchProblem& problem_;
  const std::int64_t num_slots_;
  const Surroundings around_;
  const std::int64_t num_nodes_;
  const std::int64_t num_scenarios_;
  const std::int32_t* stay_rank_;  // [E]
  const bool distinct_;            // a rank's hits are its tokens, not the rows of its experts
  const bool gateway_sets_;        // a node's hits are its tokens, not the hits of its ranks
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

  // Where tokens have homes; places are ranks, then nodes.
  std::optional<TokenSets> homes_;        // of the G + N places
  std::vector<std::int32_t> first_;       // [P, S], tokens that chose the member first
  std::vector<std::int32_t> first_rows_;  // [G + N, S], the same of places
  std::vector<double> end_value_;         // [P, G], seconds saved after it, by the member's rank
  double saved_ = 0.0;                    // sum of those values

  // The swap that was proposed last.
  std::int64_t member_[2] = {0, 0};
  std::int64_t rank_[2] = {0, 0};
  std::int64_t moved_before_ = 0;
  double next_cost_ = 0.0;
  double next_saved_ = 0.0;
};

}  // namespace moetuner
