#pragma once

#include "moetuner/planning/tally.h"
#include "planning/tally/replicas.h"

#include <cstdint>
#include <vector>

namespace moetuner {

/// Rows to replicated experts of one layer, where every home is as likely; see `LayerTally`.
///
/// Most homes of a node pick the same replicas. Their rows are counted for the node as a whole, and
/// put right for the homes that pick others. Way back and way there are alike.
class ReplicaRows {
 public:
  ReplicaRows(const TallyArgs& args, std::int64_t layer, const Replicas& replicas);

  /// A replicated expert of a token, and what the replica rule counts by.
  struct Choice {
    std::int64_t expert;
    std::int64_t number;
  };

  /// Adds a token, one unit for each home: what its replicated `experts` add to the distinct
  /// `ranks` and `nodes` that it visits from every home.
  void add(std::int64_t token,
           const std::vector<std::int64_t>& ranks,
           const std::vector<std::int64_t>& nodes,
           const std::vector<Choice>& experts);

  /// Adds what was counted for whole nodes, and the ways back. Nothing else may have been added to
  /// the links of the layer before.
  void finish();

 private:
  /// A rank that a row goes to.
  struct Stop {
    std::int64_t rank;
    std::int64_t node;
    bool new_rank;  // no other expert of the token is there
    bool new_node;
  };

  void find_stops(const std::int32_t* slots, std::vector<Stop>& stops);
  std::int64_t usual_home(std::int64_t node) const;
  bool pick_alike(std::int64_t home, std::int64_t other) const;
  void add_node(std::int64_t node, const std::int32_t* slots);
  void add_home(std::int64_t home,
                const std::int32_t* slots,
                const std::vector<Stop>& stops,
                std::int64_t sign);
  void send(std::int64_t home, const Stop& stop, std::int64_t sign);
  void finish_rank_rows(std::int64_t group, std::int64_t node, std::int64_t rank);
  std::int64_t cell(std::int64_t width) const { return cell_of(group_, width); }
  std::int64_t cell_of(std::int64_t group, std::int64_t width) const {
    return (group * args_.num_layers + layer_) * width;
  }
  std::int64_t node_of(std::int64_t rank) const { return node_of_[rank]; }

  const TallyArgs& args_;
  const std::int64_t layer_;
  const Replicas& replicas_;
  const std::int64_t num_nodes_;
  const bool direct_;
  std::vector<std::int64_t> node_of_;      // [G]; division is slow
  std::vector<std::int64_t> node_rows_;    // [Q, N, G], rows from each home of a node to a rank
  std::vector<std::int64_t> node_visits_;  // [Q, N, N], tokens of each home that cross
  std::vector<std::int64_t> rank_seen_;    // [G], stamp of the last homes that visited
  std::vector<std::int64_t> node_seen_;    // [N]
  std::int64_t stamp_ = 0;
  std::int64_t anyway_ = 0;          // stamp of what the token visits from every home
  std::int64_t group_ = 0;           // of the token
  std::int64_t num_picks_ = 0;       // replicated experts of the token
  std::vector<std::int32_t> picks_;  // [G, picks], slots
  std::vector<std::int32_t> known_;  // [picks], whose stops are `usual_`
  std::vector<Stop> usual_;
  std::vector<Stop> own_;
};

}  // namespace moetuner
