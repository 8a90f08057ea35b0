#include "planning/tally/replica_rows.h"

#include <algorithm>

namespace moetuner {

ReplicaRows::ReplicaRows(const TallyArgs& args, std::int64_t layer, const Replicas& replicas)
    : args_(args),
      layer_(layer),
      replicas_(replicas),
      num_nodes_(args.num_ranks / args.ranks_per_node),
      direct_(args.wire.crossing == Crossing::kDirect),
      node_of_(static_cast<std::size_t>(args.num_ranks)),
      rank_seen_(static_cast<std::size_t>(args.num_ranks), 0),
      node_seen_(static_cast<std::size_t>(num_nodes_), 0),
      picks_(static_cast<std::size_t>(args.num_ranks * args.top_k)) {
  for (std::int64_t rank = 0; rank < args.num_ranks; ++rank) {
    node_of_[rank] = rank / args.ranks_per_node;
  }
  if (!replicas.any()) return;
  const std::int64_t nodes = args.num_groups * num_nodes_;
  node_rows_.assign(static_cast<std::size_t>(nodes * args.num_ranks), 0);
  node_visits_.assign(static_cast<std::size_t>(nodes * num_nodes_), 0);
}

void ReplicaRows::add(std::int64_t token,
                      const std::vector<std::int64_t>& ranks,
                      const std::vector<std::int64_t>& nodes,
                      const std::vector<Choice>& experts) {
  group_ = args_.group[token];
  anyway_ = ++stamp_;
  for (const std::int64_t rank : ranks) rank_seen_[rank] = anyway_;
  for (const std::int64_t node : nodes) node_seen_[node] = anyway_;
  known_.clear();
  num_picks_ = static_cast<std::int64_t>(experts.size());
  for (std::int64_t i = 0; i < num_picks_; ++i) {
    const auto& [expert, number] = experts[i];
    replicas_.pick_by_home(expert, number, picks_.data() + i, num_picks_);
  }
  for (std::int64_t node = 0; node < num_nodes_; ++node) {
    const std::int64_t usual = usual_home(node);
    if (usual >= 0) add_node(node, picks_.data() + usual * num_picks_);
    const std::int64_t first = node * args_.ranks_per_node;
    for (std::int64_t home = first; home < first + args_.ranks_per_node; ++home) {
      if (usual >= 0 && pick_alike(home, usual)) continue;
      if (usual >= 0) add_home(home, picks_.data() + usual * num_picks_, usual_, -1);
      find_stops(picks_.data() + home * num_picks_, own_);
      add_home(home, picks_.data() + home * num_picks_, own_, 1);
    }
  }
}

bool ReplicaRows::pick_alike(std::int64_t home, std::int64_t other) const {
  const std::int32_t* picks = picks_.data() + home * num_picks_;
  return std::equal(picks, picks + num_picks_, picks_.data() + other * num_picks_);
}

/// A home whose picks most homes of the node share, if there are such; else -1. (Majority vote by
/// Boyer and Moore.)
std::int64_t ReplicaRows::usual_home(std::int64_t node) const {
  const std::int64_t first = node * args_.ranks_per_node;
  const std::int64_t end = first + args_.ranks_per_node;
  std::int64_t usual = first;
  std::int64_t votes = 0;
  for (std::int64_t home = first; home < end; ++home) {
    if (votes == 0) usual = home;
    votes += pick_alike(home, usual) ? 1 : -1;
  }
  votes = 0;
  for (std::int64_t home = first; home < end; ++home) votes += pick_alike(home, usual);
  return 2 * votes > args_.ranks_per_node ? usual : -1;
}

/// Ranks that rows go to when the experts are in these slots, beside those visited anyway.
void ReplicaRows::find_stops(const std::int32_t* slots, std::vector<Stop>& stops) {
  stops.clear();
  ++stamp_;
  for (std::int64_t i = 0; i < num_picks_; ++i) {
    const std::int64_t rank = replicas_.rank_of(slots[i]);
    const std::int64_t node = node_of(rank);
    const auto is_new = [&](std::int64_t seen) { return seen != anyway_ && seen != stamp_; };
    const Stop stop{rank, node, is_new(rank_seen_[rank]), is_new(node_seen_[node])};
    if (stop.new_rank) rank_seen_[rank] = stamp_;
    if (stop.new_node) node_seen_[node] = stamp_;
    if (stop.new_rank || args_.wire.rows == Rows::kPerExpert) stops.push_back(stop);
  }
}

/// All homes of a node pick these slots.
void ReplicaRows::add_node(std::int64_t node, const std::int32_t* slots) {
  const std::int64_t homes = args_.ranks_per_node;
  if (known_.empty() || !std::equal(known_.begin(), known_.end(), slots)) {
    known_.assign(slots, slots + num_picks_);
    find_stops(slots, usual_);
  }
  std::int64_t* rows = args_.slot_rows + cell(args_.num_slots);
  for (std::int64_t i = 0; i < num_picks_; ++i) rows[slots[i]] += homes;
  std::int64_t* node_rows = node_rows_.data() + (group_ * num_nodes_ + node) * args_.num_ranks;
  std::int64_t* visits = node_visits_.data() + (group_ * num_nodes_ + node) * num_nodes_;
  const std::int64_t at = cell(1);
  for (const Stop& stop : usual_) {
    ++node_rows[stop.rank];
    if (stop.new_rank) {
      args_.distinct_ranks[at] += homes;
      args_.remote_ranks[at] += homes - (stop.node == node);
    }
    if (stop.new_node) {
      ++visits[stop.node];
      args_.distinct_nodes[at] += homes;
      args_.remote_nodes[at] += stop.node == node ? 0 : homes;
    }
  }
}

void ReplicaRows::add_home(std::int64_t home,
                           const std::int32_t* slots,
                           const std::vector<Stop>& stops,
                           std::int64_t sign) {
  std::int64_t* rows = args_.slot_rows + cell(args_.num_slots);
  for (std::int64_t i = 0; i < num_picks_; ++i) rows[slots[i]] += sign;
  const std::int64_t at = cell(1);
  for (const Stop& stop : stops) {
    if (stop.new_rank) {
      args_.distinct_ranks[at] += sign;
      args_.remote_ranks[at] += stop.rank == home ? 0 : sign;
    }
    if (stop.new_node) {
      args_.distinct_nodes[at] += sign;
      args_.remote_nodes[at] += stop.node == node_of(home) ? 0 : sign;
    }
    if (args_.wire.rows != Rows::kToAll) send(home, stop, sign);
  }
}

/// One row from a home.
void ReplicaRows::send(std::int64_t home, const Stop& stop, std::int64_t sign) {
  const std::int64_t home_node = node_of(home);
  args_.traffic[(layer_ * args_.num_ranks + home) * args_.num_ranks + stop.rank] += sign;
  if (stop.node != home_node && (direct_ || stop.new_node)) {
    args_.node_egress[cell(num_nodes_) + home_node] += sign;
    args_.node_ingress[cell(num_nodes_) + stop.node] += sign;
  }
  if (stop.node != home_node && direct_) return;
  const std::int64_t gateway = home + (stop.node - home_node) * args_.ranks_per_node;
  if (stop.rank == gateway) return;
  args_.rank_egress[cell(args_.num_ranks) + gateway] += sign;
  args_.rank_ingress[cell(args_.num_ranks) + stop.rank] += sign;
}

/// Rows from every home of a node to a rank: all but one of them take a rank link, each from
/// another gateway; where they cross directly, from the homes of its own node alone.
void ReplicaRows::finish_rank_rows(std::int64_t group, std::int64_t node, std::int64_t rank) {
  const std::int64_t per_node = args_.ranks_per_node;
  const std::int64_t rows = node_rows_[(group * num_nodes_ + node) * args_.num_ranks + rank];
  if (rows == 0) return;
  const std::int64_t to = node_of(rank);
  for (std::int64_t home = node * per_node; home < (node + 1) * per_node; ++home) {
    args_.traffic[(layer_ * args_.num_ranks + home) * args_.num_ranks + rank] += rows;
  }
  if (direct_ && to != node) {
    args_.node_egress[cell_of(group, num_nodes_) + node] += rows * per_node;
    args_.node_ingress[cell_of(group, num_nodes_) + to] += rows * per_node;
    return;
  }
  const std::int64_t ranks = cell_of(group, args_.num_ranks);
  args_.rank_ingress[ranks + rank] += rows * (per_node - 1);
  for (std::int64_t other = to * per_node; other < (to + 1) * per_node; ++other) {
    if (other != rank) args_.rank_egress[ranks + other] += rows;
  }
}

void ReplicaRows::finish() {
  if (!replicas_.any() || args_.wire.rows == Rows::kToAll) return;
  for (std::int64_t group = 0; group < args_.num_groups; ++group) {
    for (std::int64_t node = 0; node < num_nodes_; ++node) {
      for (std::int64_t rank = 0; rank < args_.num_ranks; ++rank) {
        finish_rank_rows(group, node, rank);
      }
      for (std::int64_t to = 0; to < num_nodes_ && !direct_; ++to) {
        if (to == node) continue;
        const std::int64_t visits = node_visits_[(group * num_nodes_ + node) * num_nodes_ + to];
        args_.node_egress[cell_of(group, num_nodes_) + node] += visits * args_.ranks_per_node;
        args_.node_ingress[cell_of(group, num_nodes_) + to] += visits * args_.ranks_per_node;
      }
    }
    const std::int64_t ranks = cell_of(group, args_.num_ranks);
    const std::int64_t nodes = cell_of(group, num_nodes_);
    std::copy_n(args_.rank_egress + ranks, args_.num_ranks, args_.return_rank_ingress + ranks);
    std::copy_n(args_.rank_ingress + ranks, args_.num_ranks, args_.return_rank_egress + ranks);
    std::copy_n(args_.node_egress + nodes, num_nodes_, args_.return_node_ingress + nodes);
    std::copy_n(args_.node_ingress + nodes, num_nodes_, args_.return_node_egress + nodes);
  }
}

}  // namespace moetuner
