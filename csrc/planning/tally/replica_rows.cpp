#include "planning/tally/replica_rows.h"

#include <algorithm>

namespace moetuner {

ReplicaRows::ReplicaRows(const TallyArgs& args, std::int64_t layer, const Replicas& replicas)
    : args_(args),
      layer_(layer),
      replicas_(replicas),
      num_nodes_(args.num_ranks / args.ranks_per_node),
      direct_(args.wire.crossing == Crossing::kDirect) {
  if (!replicas.any()) return;
  const auto ranks = static_cast<std::size_t>(args.num_ranks);
  const auto nodes = static_cast<std::size_t>(num_nodes_);
  const auto groups = static_cast<std::size_t>(args.num_groups);
  for (std::int64_t rank = 0; rank < args.num_ranks; ++rank) {
    node_of_.push_back(static_cast<std::int32_t>(rank / args.ranks_per_node));
  }
  all_rows_.assign(groups * ranks, 0);
  node_rows_.assign(groups * ranks, 0);
  node_traffic_.assign(nodes * ranks, 0);
  all_crossings_.assign(groups * nodes, 0);
  rank_experts_.assign(ranks, 0);
  node_experts_.assign(nodes, 0);
  of_node_.resize(nodes);
  of_home_.resize(static_cast<std::size_t>(args.ranks_per_node));
}

void ReplicaRows::add(std::int64_t token,
                      const std::vector<std::int64_t>& ranks,
                      const std::vector<std::int64_t>& nodes,
                      const std::vector<Choice>& experts) {
  group_ = args_.group[token];
  for (const std::int64_t rank : ranks) ++rank_experts_[rank];
  for (const std::int64_t node : nodes) ++node_experts_[node];
  picked_.assign(experts.size(), -1);
  if (args_.replica_rule == ReplicaRule::kMoetuner) {
    add_nearest(experts);
  } else {
    add_by_home(experts);
  }
  for (std::size_t pick = 0; pick < experts.size(); ++pick) {
    put_back(static_cast<std::int64_t>(pick), -1);
  }
  for (const std::int64_t rank : ranks) --rank_experts_[rank];
  for (const std::int64_t node : nodes) --node_experts_[node];
}

/// `nearest_slot`: what no replica is near to is picked alike by all.
void ReplicaRows::add_nearest(const std::vector<Choice>& experts) {
  for (std::size_t i = 0; i < experts.size(); ++i) {
    const auto pick = static_cast<std::int64_t>(i);
    const std::int64_t* slots = replicas_.slots(experts[i].expert);
    const std::int64_t count = replicas_.count(experts[i].expert);
    put(pick, replicas_.in_turn(experts[i].expert, experts[i].number), all());
    for (const std::int64_t* end = slots + count; slots < end;) {
      const std::int64_t* first = slots;
      const std::int64_t node = node_of_[replicas_.rank_of(*first)];
      while (slots < end && node_of_[replicas_.rank_of(*slots)] == node) ++slots;
      of_node_[node].push_back({pick, first, slots - first});
    }
  }
  for (std::int64_t index = 0; index < num_nodes_; ++index) {
    if (!of_node_[index].empty()) add_node(index, experts);
  }
}

void ReplicaRows::add_node(std::int64_t index, const std::vector<Choice>& experts) {
  const std::int64_t first_home = index * args_.ranks_per_node;
  for (const auto& [pick, slots, count] : of_node_[index]) {
    const std::int64_t chosen = slots[experts[pick].number % count];
    put(pick, chosen, node(index));
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t rank = replicas_.rank_of(slots[i]);
      if (i > 0 && replicas_.rank_of(slots[i - 1]) == rank) continue;  // the first one serves
      of_home_[rank - first_home].push_back({pick, slots[i], chosen});
    }
  }
  for (std::int64_t place = 0; place < args_.ranks_per_node; ++place) {
    std::vector<OfHome>& own = of_home_[place];
    for (const OfHome& replica : own) put(replica.pick, replica.slot, home(first_home + place));
    for (const OfHome& replica : own) put_back(replica.pick, replica.of_node);
    own.clear();
  }
  for (const OfNode& replicas : of_node_[index]) {
    put_back(replicas.pick,
             replicas_.in_turn(experts[replicas.pick].expert, experts[replicas.pick].number));
  }
  of_node_[index].clear();
}

/// Rules by which any home may pick another replica.
void ReplicaRows::add_by_home(const std::vector<Choice>& experts) {
  const auto num_picks = static_cast<std::int64_t>(experts.size());
  slots_.resize(static_cast<std::size_t>(args_.num_ranks * num_picks));
  for (std::int64_t home = 0; home < args_.num_ranks; ++home) {
    for (std::int64_t i = 0; i < num_picks; ++i) {
      const auto& [expert, number] = experts[i];
      slots_[home * num_picks + i] =
          static_cast<std::int32_t>(replicas_.pick(expert, home, number));
    }
  }
  const auto go = [&](std::int64_t like, const From& from) {
    for (std::int64_t i = 0; i < num_picks; ++i) put(i, slots_[like * num_picks + i], from);
  };
  const auto back = [&](std::int64_t like) {
    for (std::int64_t i = 0; i < num_picks; ++i) put_back(i, slots_[like * num_picks + i]);
  };
  const std::int64_t usual = usual_home(0, args_.num_ranks);
  go(usual, all());
  for (std::int64_t index = 0; index < num_nodes_; ++index) {
    const std::int64_t first = index * args_.ranks_per_node;
    const std::int64_t of_node = usual_home(first, first + args_.ranks_per_node);
    go(of_node, node(index));
    for (std::int64_t each = first; each < first + args_.ranks_per_node; ++each) {
      go(each, home(each));
      back(of_node);
    }
    back(usual);
  }
}

/// A home that picks as most of these do, if most pick alike. (Majority vote by Boyer and Moore.)
std::int64_t ReplicaRows::usual_home(std::int64_t first, std::int64_t end) const {
  const auto num_picks = static_cast<std::int64_t>(picked_.size());
  std::int64_t usual = first;
  std::int64_t votes = 0;
  for (std::int64_t home = first; home < end; ++home) {
    if (votes == 0) usual = home;
    const std::int32_t* own = slots_.data() + home * num_picks;
    votes += std::equal(own, own + num_picks, slots_.data() + usual * num_picks) ? 1 : -1;
  }
  return usual;
}

/// Counts that these homes take this slot and not the one that they were counted with.
void ReplicaRows::put(std::int64_t pick, std::int64_t slot, const From& from) {
  const std::int64_t before = picked_[pick];
  if (before == slot) return;
  if (before >= 0) count(before, -1, from);
  count(slot, 1, from);
  picked_[pick] = slot;
}

/// Goes on from this slot again (-1: from none); what was counted stays.
void ReplicaRows::put_back(std::int64_t pick, std::int64_t slot) {
  const auto add = [&](std::int64_t at, std::int32_t sign) {
    if (at < 0) return;
    const std::int64_t rank = replicas_.rank_of(at);
    rank_experts_[rank] += sign;
    node_experts_[node_of_[rank]] += sign;
  };
  if (picked_[pick] == slot) return;
  add(picked_[pick], -1);
  add(slot, 1);
  picked_[pick] = slot;
}

void ReplicaRows::count(std::int64_t slot, std::int64_t sign, const From& from) {
  const std::int64_t rank = replicas_.rank_of(slot);
  const std::int64_t node = node_of_[rank];
  const auto is_change = [sign](std::int32_t& experts) {
    experts += static_cast<std::int32_t>(sign);
    return experts == (sign > 0 ? 1 : 0);
  };
  const bool of_rank = is_change(rank_experts_[rank]);
  const bool of_node = is_change(node_experts_[node]);
  const bool every = from.kind == From::Kind::kAll;
  args_.slot_rows[cell(args_.num_slots) + slot] += sign * from.homes;
  if (of_rank) {
    const bool among =
        from.kind == From::Kind::kHome ? from.index == rank : every || from.node == node;
    args_.distinct_ranks[cell(1)] += sign * from.homes;
    args_.remote_ranks[cell(1)] += sign * (from.homes - (among ? 1 : 0));
  }
  if (of_node) {
    const std::int64_t here = every ? args_.ranks_per_node : from.node == node ? from.homes : 0;
    args_.distinct_nodes[cell(1)] += sign * from.homes;
    args_.remote_nodes[cell(1)] += sign * (from.homes - here);
  }
  if (args_.wire.rows == Rows::kToAll) return;
  if (of_rank || args_.wire.rows == Rows::kPerExpert) add_row(rank, sign, from);
  if (of_node && !direct_) add_crossing(node, sign, from);
}

/// Rows to a rank from each of these homes.
void ReplicaRows::add_row(std::int64_t rank, std::int64_t rows, const From& from) {
  const std::int64_t to = node_of_[rank];
  if (from.kind == From::Kind::kAll) {
    all_rows_[group_ * args_.num_ranks + rank] += rows;
    return;
  }
  if (direct_ && to != from.node) {
    args_.node_egress[cell(num_nodes_) + from.node] += rows * from.homes;
    args_.node_ingress[cell(num_nodes_) + to] += rows * from.homes;
  }
  if (from.kind == From::Kind::kNode) {
    node_traffic_[from.node * args_.num_ranks + rank] += rows;
    if (!direct_ || to == from.node) node_rows_[group_ * args_.num_ranks + rank] += rows;
    return;
  }
  args_.traffic[(layer_ * args_.num_ranks + from.index) * args_.num_ranks + rank] += rows;
  const std::int64_t gateway = from.index + (to - from.node) * args_.ranks_per_node;
  if (rank == gateway || (direct_ && to != from.node)) return;
  args_.rank_egress[cell(args_.num_ranks) + gateway] += rows;
  args_.rank_ingress[cell(args_.num_ranks) + rank] += rows;
}

/// A row to a node from each of these homes, where one is enough for all its ranks.
void ReplicaRows::add_crossing(std::int64_t to, std::int64_t sign, const From& from) {
  if (from.kind == From::Kind::kAll) {
    all_crossings_[group_ * num_nodes_ + to] += sign;
  } else if (to != from.node) {
    args_.node_egress[cell(num_nodes_) + from.node] += sign * from.homes;
    args_.node_ingress[cell(num_nodes_) + to] += sign * from.homes;
  }
}

/// What was counted for all homes alike, for each node.
void ReplicaRows::finish_all_rows() {
  for (group_ = 0; group_ < args_.num_groups; ++group_) {
    for (std::int64_t rank = 0; rank < args_.num_ranks; ++rank) {
      const std::int64_t rows = all_rows_[group_ * args_.num_ranks + rank];
      for (std::int64_t index = 0; rows != 0 && index < num_nodes_; ++index) {
        add_row(rank, rows, node(index));
      }
    }
  }
}

void ReplicaRows::finish_group(std::int64_t group) {
  const std::int64_t per_node = args_.ranks_per_node;
  const std::int64_t ranks = cell_of(group, args_.num_ranks);
  const std::int64_t nodes = cell_of(group, num_nodes_);
  const std::int64_t* crossings = all_crossings_.data() + group * num_nodes_;
  std::int64_t all = 0;
  for (std::int64_t node = 0; node < num_nodes_; ++node) all += crossings[node];
  for (std::int64_t node = 0; node < num_nodes_; ++node) {
    args_.node_egress[nodes + node] += (all - crossings[node]) * per_node;
    args_.node_ingress[nodes + node] += crossings[node] * (num_nodes_ - 1) * per_node;
    const std::int64_t first = node * per_node;
    const std::int64_t* rows = node_rows_.data() + group * args_.num_ranks + first;
    std::int64_t sum = 0;
    for (std::int64_t i = 0; i < per_node; ++i) sum += rows[i];
    for (std::int64_t i = 0; i < per_node; ++i) {
      args_.rank_ingress[ranks + first + i] += rows[i] * (per_node - 1);
      args_.rank_egress[ranks + first + i] += sum - rows[i];
    }
  }
  std::copy_n(args_.rank_egress + ranks, args_.num_ranks, args_.return_rank_ingress + ranks);
  std::copy_n(args_.rank_ingress + ranks, args_.num_ranks, args_.return_rank_egress + ranks);
  std::copy_n(args_.node_egress + nodes, num_nodes_, args_.return_node_ingress + nodes);
  std::copy_n(args_.node_ingress + nodes, num_nodes_, args_.return_node_egress + nodes);
}

void ReplicaRows::finish() {
  if (!replicas_.any() || args_.wire.rows == Rows::kToAll) return;
  finish_all_rows();
  std::int64_t* traffic = args_.traffic + layer_ * args_.num_ranks * args_.num_ranks;
  for (std::int64_t home = 0; home < args_.num_ranks; ++home) {
    const std::int64_t* rows = node_traffic_.data() + node_of_[home] * args_.num_ranks;
    for (std::int64_t rank = 0; rank < args_.num_ranks; ++rank) *traffic++ += rows[rank];
  }
  for (std::int64_t group = 0; group < args_.num_groups; ++group) finish_group(group);
}

}  // namespace moetuner
