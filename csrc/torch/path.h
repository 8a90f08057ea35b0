#pragma once

#include "wire.h"

#include <string>
#include <vector>

// The way of a row, hop by hop. A row goes to all ranks at once, or, on several nodes, first to the
// rank of its own place in each node, its gateway there, and from there to ranks of that node:
//
//     one hop     home ----------------> rank
//
//     two hops    home ---> gateway ---> rank      one row for each node, then one for each rank
//
// The gateway is the evaluator's (`Wire::kDedup` of the planner). The last hop stays inside a node
// when there are two; it is where another transport than a communicator may take rows.

namespace moetuner {

/// Ranks are numbered node by node.
class Path {
 public:
  /// `groups` are the names of one group, or of two: the ranks of this place in all nodes, then
  /// the ranks of this node. `op` is named in each error.
  Path(const char* op, const std::vector<std::string>& groups);

  bool crosses_nodes() const { return wires_.size() == 2; }
  std::size_t num_hops() const { return wires_.size(); }
  const Wire& hop(std::size_t index) const { return wires_[index]; }
  /// Of `crosses_nodes`.
  const Wire& between_nodes() const { return wires_.front(); }
  const Wire& last() const { return wires_.back(); }

  std::int64_t num_ranks() const;
  std::int64_t rank() const;

 private:
  std::vector<Wire> wires_;
};

/// A way that rows have gone, by what was kept of it: of each hop int32 [rows, places], the row on
/// the wire for each place that a row went to, and its `Splits`.
class Trail {
 public:
  Trail(const char* op,
        const std::vector<std::string>& groups,
        at::TensorList send_maps,
        at::TensorList splits);

  /// Rows from where they arrived to their homes; those of one token are summed at each end of a
  /// hop, in the order of places.
  at::Tensor home(at::Tensor rows) const;

  /// A row for each token to all places where its rows arrived, `num_arrived` of them here.
  at::Tensor out(at::Tensor rows, std::int64_t num_arrived) const;

 private:
  const char* op_;
  Path path_;
  std::vector<at::Tensor> send_maps_;
  std::vector<Splits> splits_;
};

}  // namespace moetuner
