#pragma once

#include "moetuner/planning/search.h"

#include <cstdint>
#include <vector>

namespace moetuner {

/// What a row on a link counts where tokens have homes: it may be saved in one direction alone.
constexpr std::int32_t kLinkRow = 64;

/// Rows of a layer on every rank and node, for every scenario, and their price.
///
/// Arrays are [place, S], so that loops over scenarios run over neighbours in memory. Whoever
/// changes rows of a rank or node calls `refresh` for its node.
class ScenarioCosts {
 public:
  explicit ScenarioCosts(const SearchProblem& problem);

  std::int32_t* load(std::int64_t rank) { return load_.data() + rank * size_; }
  std::int32_t* active(std::int64_t rank) { return active_.data() + rank * size_; }
  std::int32_t* hits(std::int64_t rank) { return hits_.data() + rank * size_; }
  std::int32_t* node_hits(std::int64_t node) { return node_hits_.data() + node * size_; }
  double& total(std::int64_t rank) { return total_[rank]; }

  void clear();

  /// The maxima over the ranks of a node, anew.
  void refresh(std::int64_t node);
  void refresh_all();

  /// Search cost of the layer, in seconds.
  double price();

  /// Keeps rows of two ranks and their nodes, to come back to.
  void save(const std::int64_t (&ranks)[2]);
  void restore();

 private:
  void refresh_unlike(std::int64_t node);
  double exchange_unlike(std::int64_t s, double sum, double unit) const;
  std::int64_t node_of(std::int64_t rank) const { return rank / problem_.ranks_per_node; }
  template <typename Body>
  void for_saved(const Body& body);

  const SearchProblem& problem_;
  const std::int64_t size_;  // S
  const std::int64_t num_nodes_;
  const bool unlike_;                 // some links are faster than others
  std::vector<double> mean_load_;     // [S], rows per rank
  std::vector<std::int32_t> load_;    // [G, S], rows
  std::vector<std::int32_t> active_;  // [G, S], experts with a row
  std::vector<std::int32_t> hits_;    // [G, S], rows on its links, both ways; times kLinkRow where
                                      // tokens have homes
  std::vector<std::int32_t> node_hits_;  // [N, S], the same
  std::vector<double> total_;            // [G], weighted rows of all scenarios
  // Of each node, [N, S]:
  std::vector<double> compute_;   // seconds of the slowest rank
  std::vector<double> peak_;      // rows of the fullest rank
  std::vector<double> links_;     // rows on the busiest rank link, times G
  std::vector<double> back_;      // `links_` of the way back, where links are not alike
  std::vector<double> squares_;   // sum of squared rows
  std::vector<double> hits_sum_;  // sum of rows that arrive
  std::vector<double> scratch_;   // [8, S]
  std::int64_t saved_ranks_[2] = {0, 0};
  double saved_total_[2] = {0.0, 0.0};
  std::vector<std::int32_t> saved_counts_;
  std::vector<double> saved_maxima_;
};

}  // namespace moetuner
