#pragma once

#include "moetuner/planning/search.h"
#include "planning/tally/link_counts.h"
#include "planning/tally/replica_numbers.h"
#include "planning/tally/replicas.h"

#include <cstdint>
#include <vector>

namespace moetuner {

/// The choices of one layer of a search.
inline LayerChoices choices_of(const SearchProblem& problem, std::int64_t layer) {
  return {.topk_ids = problem.topk_ids,
          .num_tokens = problem.num_tokens,
          .num_layers = problem.num_layers,
          .top_k = problem.top_k,
          .num_experts = problem.num_experts,
          .layer = layer,
          .token = problem.token};
}

/// One layer of a token search: its slots, the rows they make, and what a move would cost.
class TokenLayer {
 public:
  /// `home` [T] is where tokens are when the layer begins, `rows` what a replica rule may ask for.
  /// `next_ranks` [T, K] are the ranks of
  /// their experts at the next layer (-1: padding), null when nothing follows.
  TokenLayer(const SearchProblem& problem,
             const SearchState& state,
             std::int64_t layer,
             const std::int32_t* home,
             const std::int32_t* next_ranks,
             const SourceRows& rows);

  double cost() const { return cost_; }
  const std::vector<std::int32_t>& slots() const { return slots_; }
  /// Slots that hold the expert.
  std::int64_t copies(std::int64_t expert) const {
    return static_cast<std::int64_t>(slots_of_[expert].size());
  }
  bool holds(std::int64_t rank, std::int32_t expert) const;

  /// The cost with slots `p` and `q` (or `p` alone when q < 0) holding other experts; -1 empties.
  /// Must be followed by `accept` or `reject`, and keep the placement legal.
  double propose(std::int64_t p, std::int32_t expert_p, std::int64_t q, std::int32_t expert_q);
  void accept();
  void reject();

 private:
  void put(std::int64_t slot, std::int32_t expert);
  void list_slots(std::int32_t expert, std::int64_t slot, bool add);
  std::int32_t pick(std::int64_t t, std::int64_t k) const;
  void repick(std::int64_t t, std::int32_t e, std::int32_t f);
  /// Ranks that a token visits and where it ends.
  struct Visit {
    std::vector<std::int32_t> ranks;  // distinct with dedup
    std::int32_t end = 0;
  };
  void visit(std::int64_t t, Visit& visit);
  void distinct(const std::int32_t* ranks, std::vector<std::int32_t>& found);
  bool same_ranks(const Visit& a, const Visit& b);
  void add_next(std::int64_t t, std::int64_t s, std::int32_t end, std::int32_t sign);
  double price() const;
  double price_scenario(std::int64_t s) const;
  const std::int16_t* ids(std::int64_t t) const { return ids_.data() + t * problem_.top_k; }

  /// All that a proposal changes and a rejection restores.
  struct Counts {
    std::vector<std::int32_t> slot_rows;  // [S, P]
    LinkCounts dispatch;
    LinkCounts combine;
    LinkCounts next;
  };

  const SearchProblem& problem_;
  const std::int64_t num_slots_;
  const std::int64_t slots_per_rank_;
  const ReplicaLayout replica_layout_;
  const ReplicaNumbers numbers_;
  const std::int32_t* home_;
  const bool has_next_;
  const bool distinct_;                               // rows are one per rank, not one per expert
  std::vector<std::int16_t> ids_;                     // [T, K] of this layer, side by side
  std::vector<std::int64_t> scenario_of_;             // [T]
  std::vector<std::vector<std::int32_t>> tokens_of_;  // [E], tokens that chose the expert
  std::vector<std::vector<std::int32_t>> slots_of_;   // [E], in slot order
  std::vector<std::int32_t> slots_;                   // [P], expert
  std::vector<std::int32_t> picked_;                  // [T, K], slot, -1: padding
  Counts counts_;
  double cost_ = 0.0;
  std::vector<std::int32_t> rank_of_;     // [P]; division is slow
  std::vector<std::int32_t> next_begin_;  // [T + 1], into next_distinct_
  std::vector<std::int32_t> next_distinct_;
  std::vector<std::int32_t> rank_seen_;  // [G], stamp
  std::int32_t stamp_ = 0;
  Visit before_;
  Visit after_;

  struct Proposal {
    std::int64_t slot[2];
    std::int32_t before[2];
    double cost;
    std::vector<std::int32_t> tokens;  // whose picks changed
    std::vector<std::int32_t> picked;  // [tokens, K], before
  } proposal_;
  Counts saved_;
};

}  // namespace moetuner
