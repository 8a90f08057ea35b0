#pragma once

#include "moetuner/planning/tally.h"
#include "planning/tally/replica_numbers.h"
#include "planning/tally/replica_rows.h"
#include "planning/tally/replicas.h"

#include <cstdint>
#include <vector>

namespace moetuner {

/// Adds the tokens of one layer to the outputs of a tally. One thread owns a layer.
class LayerTally {
 public:
  LayerTally(const TallyArgs& args,
             std::int64_t layer,
             const Replicas& replicas,
             const ReplicaNumbers& numbers);

  /// Adds one token at one home, `weight` units a row.
  void add_token(std::int64_t token, std::int64_t home, std::int64_t weight);

  /// Adds every token at every home, one unit each.
  ///
  /// Where a token finds an expert depends on its home only where that has replicas, and by some
  /// rules, see `ReplicaRows`; of all others the hits per rank are counted, and spread over the
  /// homes in the end.
  ///
  /// `dealt` [T] are the homes for `TallyArgs::slot_used`, null where that is.
  void add_uniform_homes(const std::int32_t* dealt);

 private:
  /// One direction of the exchange: where rows are counted.
  struct Links {
    std::int64_t* rank_egress;
    std::int64_t* rank_ingress;
    std::int64_t* node_egress;
    std::int64_t* node_ingress;
  };

  /// The ranks and nodes that one token visits.
  struct Visit {
    std::vector<std::int64_t> ranks;            // distinct, in order of the token's experts
    std::vector<std::int64_t> nodes;            // distinct
    std::vector<std::int64_t> expert_ranks;     // one per (token, expert)
    std::vector<ReplicaRows::Choice> left_out;  // experts that homes find in different slots
    std::int64_t first_rank = -1;               // rank of the first expert, -1 when it is padding
  };

  Links dispatch_links(std::int64_t group) const;
  Links return_links(std::int64_t group) const;      // as seen from the return rank: reversed
  const std::vector<std::int64_t>& targets() const;  // of the last visit, ranks that rows go to
  void use_slots(std::int64_t token, std::int64_t home) const;
  bool depends_on_home(std::int64_t expert) const {
    return replicas_.count(expert) > 1 && asks_home(args_.replica_rule);
  }
  /// Which of a token's experts a visit is to: all, or those that every home finds alike.
  enum class Experts { kAll, kAlikeFromAll };
  void visit(std::int64_t token, std::int64_t home, std::int64_t weight, Experts experts);
  void route(std::int64_t home, const Links& links, std::int64_t weight) const;
  void route_ring(std::int64_t home, const Links& links, std::int64_t weight) const;
  void add_expected(std::int64_t group,
                    const std::vector<std::int64_t>& rank_hits,
                    const std::vector<std::int64_t>& node_hits);
  std::int64_t offset(std::int64_t group, std::int64_t width) const;
  std::int64_t node_of(std::int64_t rank) const { return node_of_[rank]; }

  const TallyArgs& args_;
  const std::int64_t layer_;
  const Replicas& replicas_;
  const ReplicaNumbers& numbers_;
  const std::int64_t num_nodes_;
  std::vector<std::int32_t> node_of_;  // [G]; division is slow
  Visit visit_;
  std::vector<std::int64_t> rank_seen_;  // [G], stamp of the last token that visited
  std::vector<std::int64_t> node_seen_;  // [N]
  std::vector<std::int64_t> all_ranks_;  // [G]
  std::int64_t stamp_ = 0;
};

}  // namespace moetuner
