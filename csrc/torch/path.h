#pragma once

#include "communicator.h"

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
// when there are two; it is where peer memory may take the place of a communicator.

namespace moetuner {

/// Ranks are numbered node by node.
class Path {
 public:
  /// `groups` are the names of one group, or of two: the ranks of this place in all nodes, then
  /// the ranks of this node. `op` is named in each error.
  Path(const char* op, const std::vector<std::string>& groups);

  bool crosses_nodes() const { return hops_.size() == 2; }
  std::size_t num_hops() const { return hops_.size(); }
  const Communicator& hop(std::size_t index) const { return hops_[index]; }
  /// Of `crosses_nodes`.
  const Communicator& between_nodes() const { return hops_.front(); }
  const Communicator& last() const { return hops_.back(); }

  std::int64_t num_ranks() const;
  std::int64_t rank() const;

 private:
  std::vector<Communicator> hops_;
};

/// One hop of a way that rows have gone, by what was kept of it.
struct Hop {
  std::string group;
  at::Tensor send_map;  // int32 [rows, places], the row on the wire for each place it went to
  Splits shares;
};

/// A way that rows have gone.
class Trail {
 public:
  Trail(const char* op,
        const std::vector<std::string>& groups,
        at::TensorList send_maps,
        at::TensorList splits);

  const char* op() const { return op_; }
  std::size_t num_hops() const { return hops_.size(); }
  const Hop& last() const { return hops_.back(); }

  /// Rows from the end of the first `hops` hops to their homes; those of one token are summed at
  /// each end of a hop, in the order of places.
  at::Tensor home(at::Tensor rows, std::size_t hops) const;

  /// A row for each token to the ends of the first `hops` hops; `num_arrived` are here at the end
  /// of all.
  at::Tensor out(at::Tensor rows, std::size_t hops, std::int64_t num_arrived) const;

 private:
  const char* op_;
  Path path_;
  std::vector<Hop> hops_;
};

}  // namespace moetuner
