#pragma once

#include "moetuner/planning/price.h"
#include "moetuner/planning/wire.h"

#include <cstdint>
#include <vector>

namespace moetuner {

/// Rows on every link of one exchange, for every scenario; rows of one token come and go.
///
/// The way from a home to ranks is that of `LayerTally::route`, and back the same links the other
/// way round.
class LinkCounts {
 public:
  LinkCounts(std::int64_t num_scenarios,
             std::int64_t num_ranks,
             std::int64_t ranks_per_node,
             WireRules wire);

  /// Adds (sign 1) or takes away (-1) a token at `home` whose experts are on `ranks` [count]; with
  /// dedup the ranks are distinct.
  void add(std::int64_t scenario,
           std::int32_t home,
           const std::int32_t* ranks,
           std::int64_t count,
           std::int32_t sign);

  /// Rows on the busiest link of a rank and of a node; with `back` they go the other way round.
  double busiest_rank(std::int64_t scenario, const LinkFactors& links, bool back) const;
  double busiest_node(std::int64_t scenario, const LinkFactors& links, bool back) const;
  std::int32_t remote_ranks(std::int64_t scenario) const { return remote_[scenario * 2]; }
  std::int32_t remote_nodes(std::int64_t scenario) const { return remote_[scenario * 2 + 1]; }

 private:
  std::int64_t num_ranks_;
  std::int64_t num_nodes_;
  std::int64_t ranks_per_node_;
  WireRules wire_;
  std::vector<std::int32_t> node_of_;    // [G]; division is slow
  std::vector<std::int32_t> node_seen_;  // [N], stamp of the last token that visited
  std::int32_t stamp_ = 0;
  std::vector<std::int32_t> rank_;    // [S, 2, G], egress and ingress
  std::vector<std::int32_t> node_;    // [S, 2, N]
  std::vector<std::int32_t> remote_;  // [S, 2], ranks and nodes other than the home
};

}  // namespace moetuner
