#pragma once

#include "moetuner/planning/tally.h"
#include "planning/tally/replicas.h"

#include <cstdint>
#include <vector>

namespace moetuner {

/// Rows to replicated experts of one layer, where every home is as likely; see `LayerTally`.
///
/// Rows are counted for all homes alike, put right for nodes that pick other replicas, and put
/// right again for homes that do. Way back and way there are alike.
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
  /// Homes that are counted together.
  struct From {
    enum class Kind { kAll, kNode, kHome } kind;
    std::int64_t index;  // of the node or the home
    std::int64_t node;   // of them, -1: every
    std::int64_t homes;
  };
  /// Replicas of an expert on one node.
  struct OfNode {
    std::int64_t pick;  // which of the token's replicated experts
    const std::int64_t* slots;
    std::int64_t count;
  };
  /// The replica that a home has itself, and what its node picks else.
  struct OfHome {
    std::int64_t pick;
    std::int64_t slot;
    std::int64_t of_node;
  };

  From all() const { return {From::Kind::kAll, 0, -1, args_.num_ranks}; }
  From node(std::int64_t index) const {
    return {From::Kind::kNode, index, index, args_.ranks_per_node};
  }
  From home(std::int64_t index) const { return {From::Kind::kHome, index, node_of_[index], 1}; }

  void add_nearest(const std::vector<Choice>& experts);
  void add_node(std::int64_t index, const std::vector<Choice>& experts);
  void add_by_home(const std::vector<Choice>& experts);
  std::int64_t usual_home(std::int64_t first, std::int64_t end) const;

  void put(std::int64_t pick, std::int64_t slot, const From& from);
  void put_back(std::int64_t pick, std::int64_t slot);
  void count(std::int64_t slot, std::int64_t sign, const From& from);
  void add_row(std::int64_t rank, std::int64_t rows, const From& from);
  void add_crossing(std::int64_t to, std::int64_t sign, const From& from);
  void finish_all_rows();
  void finish_group(std::int64_t group);
  std::int64_t cell(std::int64_t width) const { return cell_of(group_, width); }
  std::int64_t cell_of(std::int64_t group, std::int64_t width) const {
    return (group * args_.num_layers + layer_) * width;
  }

  const TallyArgs& args_;
  const std::int64_t layer_;
  const Replicas& replicas_;
  const std::int64_t num_nodes_;
  const bool direct_;
  std::vector<std::int32_t> node_of_;   // [G]; division is slow
  std::vector<std::int64_t> all_rows_;  // [Q, G], from each home to a rank
  // Rows that whole nodes send to a rank. Of a node all but one home take a rank link, each from
  // another gateway; where rows cross directly, its own node's homes alone do.
  std::vector<std::int64_t> node_rows_;       // [Q, G], from each home of one node
  std::vector<std::int64_t> node_traffic_;    // [N, G], from each home of the node
  std::vector<std::int64_t> all_crossings_;   // [Q, N], tokens of all homes that visit the node
  std::vector<std::int32_t> rank_experts_;    // [G], of the token as it is picked now
  std::vector<std::int32_t> node_experts_;    // [N]
  std::int64_t group_ = 0;                    // of the token
  std::vector<std::int64_t> picked_;          // slot of each replicated expert now, -1: not yet
  std::vector<std::vector<OfNode>> of_node_;  // [N]
  std::vector<std::vector<OfHome>> of_home_;  // [m], by place in the node
  std::vector<std::int32_t> slots_;           // [G, picks], by home
};

}  // namespace moetuner
