#include "planning/tally/layer_tally.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace moetuner {
namespace {

/// Tokens whose choices are fetched ahead: those of a layer lie too far apart for the machine's
/// own guess.
constexpr std::int64_t kAhead = 12;

}  // namespace

LayerTally::LayerTally(const TallyArgs& args,
                       std::int64_t layer,
                       const Replicas& replicas,
                       const ReplicaNumbers& numbers)
    : args_(args),
      layer_(layer),
      replicas_(replicas),
      numbers_(numbers),
      num_nodes_(args.num_ranks / args.ranks_per_node),
      node_of_(static_cast<std::size_t>(args.num_ranks)),
      rank_seen_(static_cast<std::size_t>(args.num_ranks), 0),
      node_seen_(static_cast<std::size_t>(num_nodes_), 0),
      all_ranks_(static_cast<std::size_t>(args.num_ranks)) {
  std::iota(all_ranks_.begin(), all_ranks_.end(), 0);
  for (std::int64_t rank = 0; rank < args.num_ranks; ++rank) {
    node_of_[rank] = static_cast<std::int32_t>(rank / args.ranks_per_node);
  }
}

std::int64_t LayerTally::offset(std::int64_t group, std::int64_t width) const {
  return (group * args_.num_layers + layer_) * width;
}

LayerTally::Links LayerTally::dispatch_links(std::int64_t group) const {
  const std::int64_t ranks = offset(group, args_.num_ranks);
  const std::int64_t nodes = offset(group, num_nodes_);
  return {args_.rank_egress + ranks,
          args_.rank_ingress + ranks,
          args_.node_egress + nodes,
          args_.node_ingress + nodes};
}

LayerTally::Links LayerTally::return_links(std::int64_t group) const {
  const std::int64_t ranks = offset(group, args_.num_ranks);
  const std::int64_t nodes = offset(group, num_nodes_);
  return {args_.return_rank_ingress + ranks,
          args_.return_rank_egress + ranks,
          args_.return_node_ingress + nodes,
          args_.return_node_egress + nodes};
}

void LayerTally::visit(std::int64_t token,
                       std::int64_t home,
                       std::int64_t weight,
                       Experts experts) {
  visit_.ranks.clear();
  visit_.nodes.clear();
  visit_.expert_ranks.clear();
  visit_.left_out.clear();
  visit_.first_rank = -1;
  ++stamp_;
  const std::int64_t stride = args_.num_layers * args_.top_k;
  const std::int16_t* ids = args_.topk_ids + token * stride + layer_ * args_.top_k;
  __builtin_prefetch(ids + kAhead * stride);  // a hint: behind the last token it does nothing
  std::int64_t* rows = args_.slot_rows + offset(args_.group[token], args_.num_slots);
  for (std::int64_t k = 0; k < args_.top_k; ++k) {
    if (ids[k] < 0 || ids[k] >= args_.num_experts) continue;
    std::int64_t slot = replicas_.lone(ids[k]);
    if (slot < 0) {
      const std::int64_t number = numbers_.of(token, k, ids[k]);
      if (experts == Experts::kAlikeFromAll && depends_on_home(ids[k])) {
        visit_.left_out.push_back({ids[k], number});
        continue;
      }
      slot = replicas_.pick(ids[k], home, number);
    }
    if (slot < 0) {
      throw std::invalid_argument("tally_routing: token " + std::to_string(token) +
                                  " chose expert " + std::to_string(ids[k]) +
                                  ", which has no slot at layer column " + std::to_string(layer_));
    }
    rows[slot] += weight;
    const std::int64_t rank = replicas_.rank_of(slot);
    const std::int64_t node = node_of(rank);
    if (k == 0) visit_.first_rank = rank;
    visit_.expert_ranks.push_back(rank);
    if (rank_seen_[rank] != stamp_) {
      rank_seen_[rank] = stamp_;
      visit_.ranks.push_back(rank);
    }
    if (node_seen_[node] != stamp_) {
      node_seen_[node] = stamp_;
      visit_.nodes.push_back(node);
    }
  }
}

const std::vector<std::int64_t>& LayerTally::targets() const {
  switch (args_.wire.rows) {
    case Rows::kPerRank:
      return visit_.ranks;
    case Rows::kPerExpert:
      return visit_.expert_ranks;
    case Rows::kToAll:
      return all_ranks_;
  }
  throw std::invalid_argument("tally_routing: no such rows");
}

void LayerTally::route(std::int64_t home, const Links& links, std::int64_t weight) const {
  if (args_.wire.crossing == Crossing::kRing) {
    route_ring(home, links, weight);
    return;
  }
  const std::int64_t home_node = node_of(home);
  const std::int64_t local = home % args_.ranks_per_node;
  if (args_.wire.crossing == Crossing::kDirect) {
    for (const std::int64_t rank : targets()) {
      if (rank == home) continue;
      const std::int64_t node = node_of(rank);
      if (node == home_node) {
        links.rank_egress[home] += weight;
        links.rank_ingress[rank] += weight;
      } else {
        links.node_egress[home_node] += weight;
        links.node_ingress[node] += weight;
      }
    }
    return;
  }
  for (const std::int64_t node : visit_.nodes) {
    if (node == home_node) continue;
    links.node_egress[home_node] += weight;
    links.node_ingress[node] += weight;
  }
  for (const std::int64_t rank : targets()) {
    const std::int64_t gateway = node_of(rank) * args_.ranks_per_node + local;
    if (rank == gateway) continue;  // on the home node the gateway is the home itself
    links.rank_egress[gateway] += weight;
    links.rank_ingress[rank] += weight;
  }
}

/// From each rank to its next, but for the one whose next is the home.
void LayerTally::route_ring(std::int64_t home, const Links& links, std::int64_t weight) const {
  for (std::int64_t rank = 0; rank < args_.num_ranks; ++rank) {
    const std::int64_t next = rank + 1 < args_.num_ranks ? rank + 1 : 0;
    if (next == home) continue;
    if (node_of(rank) == node_of(next)) {
      links.rank_egress[rank] += weight;
      links.rank_ingress[next] += weight;
    } else {
      links.node_egress[node_of(rank)] += weight;
      links.node_ingress[node_of(next)] += weight;
    }
  }
}

void LayerTally::add_token(std::int64_t token, std::int64_t home, std::int64_t weight) {
  const std::int64_t group = args_.group[token];
  visit(token, home, weight, Experts::kAll);
  const bool follow = args_.homes == Homes::kFollow && visit_.first_rank >= 0;
  route(home, dispatch_links(group), weight);
  route(follow ? visit_.first_rank : home, return_links(group), weight);

  const std::int64_t cell = offset(group, 1);
  const auto num_ranks = static_cast<std::int64_t>(visit_.ranks.size());
  const auto num_nodes = static_cast<std::int64_t>(visit_.nodes.size());
  args_.distinct_ranks[cell] += weight * num_ranks;
  args_.distinct_nodes[cell] += weight * num_nodes;
  args_.remote_ranks[cell] += weight * (num_ranks - (rank_seen_[home] == stamp_));
  args_.remote_nodes[cell] += weight * (num_nodes - (node_seen_[node_of(home)] == stamp_));
  std::int64_t* traffic = args_.traffic + (layer_ * args_.num_ranks + home) * args_.num_ranks;
  for (const std::int64_t rank : targets()) traffic[rank] += weight;
}

void LayerTally::use_slots(std::int64_t token, std::int64_t home) const {
  const std::int16_t* ids = args_.topk_ids + (token * args_.num_layers + layer_) * args_.top_k;
  std::int64_t* used = args_.slot_used + offset(args_.group[token], args_.num_slots);
  for (std::int64_t k = 0; k < args_.top_k; ++k) {
    if (ids[k] < 0 || ids[k] >= args_.num_experts) continue;
    used[replicas_.pick(ids[k], home, numbers_.of(token, k, ids[k]))] += args_.num_ranks;
  }
}

void LayerTally::add_uniform_homes(const std::int32_t* dealt) {
  const std::int64_t num_ranks = args_.num_ranks;
  // Per group: rows arriving at each rank and node, over all tokens, from one home each.
  std::vector<std::int64_t> rank_hits(static_cast<std::size_t>(args_.num_groups * num_ranks), 0);
  std::vector<std::int64_t> node_hits(static_cast<std::size_t>(args_.num_groups * num_nodes_), 0);
  ReplicaRows replica_rows(args_, layer_, replicas_);
  for (std::int64_t t = 0; t < args_.num_tokens; ++t) {
    const std::int64_t group = args_.group[t];
    visit(t, 0, num_ranks, Experts::kAlikeFromAll);
    const std::int64_t cell = offset(group, 1);
    const auto ranks = static_cast<std::int64_t>(visit_.ranks.size());
    const auto nodes = static_cast<std::int64_t>(visit_.nodes.size());
    args_.distinct_ranks[cell] += ranks * num_ranks;
    args_.distinct_nodes[cell] += nodes * num_ranks;
    args_.remote_ranks[cell] += ranks * (num_ranks - 1);
    args_.remote_nodes[cell] += nodes * (num_ranks - args_.ranks_per_node);
    std::int64_t* hits = rank_hits.data() + group * num_ranks;
    std::int64_t* nodes_hit = node_hits.data() + group * num_nodes_;
    for (const std::int64_t rank : targets()) ++hits[rank];
    switch (args_.wire.crossing) {
      case Crossing::kGateway:
        for (const std::int64_t node : visit_.nodes) ++nodes_hit[node];
        break;
      case Crossing::kRing:
        break;  // all ranks are hit alike
      case Crossing::kDirect:
        for (const std::int64_t rank : targets()) ++nodes_hit[node_of(rank)];
        break;
    }
    if (dealt != nullptr) use_slots(t, dealt[t]);
    if (!visit_.left_out.empty()) replica_rows.add(t, visit_.ranks, visit_.nodes, visit_.left_out);
  }
  replica_rows.finish();
  for (std::int64_t group = 0; group < args_.num_groups; ++group) {
    add_expected(
        group,
        {rank_hits.begin() + group * num_ranks, rank_hits.begin() + (group + 1) * num_ranks},
        {node_hits.begin() + group * num_nodes_, node_hits.begin() + (group + 1) * num_nodes_});
  }
}

/// Rows on every link when each hit comes once from every home, in units of 1 / G.
///
/// m = ranks per node. A rank takes a row over its rank link unless the sender (the home, or the
/// gateway with the home's local index) is the rank itself: of G homes, gateways leave (m - 1) N,
/// rows that cross directly the m - 1 homes of its own node.
void LayerTally::add_expected(std::int64_t group,
                              const std::vector<std::int64_t>& rank_hits,
                              const std::vector<std::int64_t>& node_hits) {
  const std::int64_t per_node = args_.ranks_per_node;
  const std::int64_t senders = args_.wire.crossing == Crossing::kDirect ? 1 : num_nodes_;
  const Links out = dispatch_links(group);
  const Links back = return_links(group);
  const bool ring = args_.wire.crossing == Crossing::kRing;
  for (std::int64_t home = 0; ring && home < args_.num_ranks; ++home) {
    route_ring(home, out, rank_hits[0]);
    route_ring(home, back, rank_hits[0]);
  }
  const std::int64_t all_nodes =
      std::accumulate(node_hits.begin(), node_hits.end(), std::int64_t{0});
  for (std::int64_t node = 0; !ring && node < num_nodes_; ++node) {
    const std::int64_t first = node * per_node;
    std::int64_t node_sum = 0;
    for (std::int64_t i = 0; i < per_node; ++i) node_sum += rank_hits[first + i];
    for (std::int64_t rank = first; rank < first + per_node; ++rank) {
      const std::int64_t ingress = rank_hits[rank] * (per_node - 1) * senders;
      const std::int64_t egress = (node_sum - rank_hits[rank]) * senders;
      out.rank_ingress[rank] += ingress;
      out.rank_egress[rank] += egress;
      back.rank_ingress[rank] += ingress;
      back.rank_egress[rank] += egress;
    }
    const std::int64_t ingress = node_hits[node] * (args_.num_ranks - per_node);
    const std::int64_t egress = (all_nodes - node_hits[node]) * per_node;
    out.node_ingress[node] += ingress;
    out.node_egress[node] += egress;
    back.node_ingress[node] += ingress;
    back.node_egress[node] += egress;
  }
  std::int64_t* traffic = args_.traffic + layer_ * args_.num_ranks * args_.num_ranks;
  for (std::int64_t home = 0; home < args_.num_ranks; ++home) {
    for (std::int64_t rank = 0; rank < args_.num_ranks; ++rank) {
      traffic[home * args_.num_ranks + rank] += rank_hits[rank];
    }
  }
}

}  // namespace moetuner
