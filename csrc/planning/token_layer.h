#pragma once

#include "link_counts.h"
#include "moetuner/token_search.h"

#include <cstdint>
#include <vector>

namespace moetuner {

/// One layer of a token search: its slots, the rows they make, and what a move would cost.
class TokenLayer {
 public:
  /// `home` [T] is where tokens are when the layer begins. `next_ranks` [T, K] are the ranks of
  /// their experts at the next layer (-1: padding), null when nothing follows.
  TokenLayer(const TokenSearchArgs& args,
             std::int64_t layer,
             const std::int32_t* home,
             const std::int32_t* next_ranks);

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
  std::int32_t pick(std::int32_t expert, std::int64_t home, std::int64_t token) const;
  void repick(std::int64_t t, std::int64_t s, std::int32_t e, std::int32_t f);
  void count(std::int64_t t, std::int64_t s, const std::int32_t* slots, std::int32_t sign);
  double price() const;
  double price_scenario(std::int64_t s) const;
  std::int64_t rank_of(std::int64_t slot) const { return slot / slots_per_rank_; }
  const std::int16_t* ids(std::int64_t t) const {
    return args_.topk_ids + (t * args_.num_layers + layer_) * args_.top_k;
  }

  /// All that a proposal changes and a rejection restores.
  struct Counts {
    std::vector<std::int32_t> slot_rows;  // [S, P]
    LinkCounts dispatch;
    LinkCounts combine;
    LinkCounts next;
  };

  const TokenSearchArgs& args_;
  const std::int64_t layer_;
  const std::int64_t slots_per_rank_;
  const std::int32_t* home_;
  const std::int32_t* next_ranks_;
  std::vector<std::int64_t> scenario_of_;             // [T]
  std::vector<std::vector<std::int32_t>> tokens_of_;  // [E], tokens that chose the expert
  std::vector<std::vector<std::int32_t>> slots_of_;   // [E], in slot order
  std::vector<std::int32_t> slots_;                   // [P], expert
  std::vector<std::int32_t> picked_;                  // [T, K], slot, -1: padding
  Counts counts_;
  double cost_ = 0.0;
  std::vector<std::int32_t> ranks_;  // scratch

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
