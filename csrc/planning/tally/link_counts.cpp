#include "planning/tally/link_counts.h"

namespace moetuner {

LinkCounts::LinkCounts(std::int64_t num_scenarios,
                       std::int64_t num_ranks,
                       std::int64_t ranks_per_node,
                       WireRules wire)
    : num_ranks_(num_ranks),
      num_nodes_(num_ranks / ranks_per_node),
      ranks_per_node_(ranks_per_node),
      wire_(wire),
      node_of_(static_cast<std::size_t>(num_ranks)),
      node_seen_(static_cast<std::size_t>(num_nodes_), 0),
      rank_(static_cast<std::size_t>(num_scenarios * 2 * num_ranks), 0),
      node_(static_cast<std::size_t>(num_scenarios * 2 * num_nodes_), 0),
      remote_(static_cast<std::size_t>(num_scenarios * 2), 0) {
  for (std::int64_t rank = 0; rank < num_ranks; ++rank) {
    node_of_[rank] = static_cast<std::int32_t>(rank / ranks_per_node);
  }
}

void LinkCounts::add(std::int64_t scenario,
                     std::int32_t home,
                     const std::int32_t* ranks,
                     std::int64_t count,
                     std::int32_t sign) {
  if (wire_.rows == Rows::kToAll) return;  // placement changes nothing
  std::int32_t* rank_out = rank_.data() + scenario * 2 * num_ranks_;
  std::int32_t* rank_in = rank_out + num_ranks_;
  std::int32_t* node_out = node_.data() + scenario * 2 * num_nodes_;
  std::int32_t* node_in = node_out + num_nodes_;
  std::int32_t* remote = remote_.data() + scenario * 2;
  const auto per_node = static_cast<std::int32_t>(ranks_per_node_);
  const std::int32_t home_node = node_of_[home];
  const std::int32_t local = home - home_node * per_node;
  const bool direct = wire_.crossing == Crossing::kDirect;
  ++stamp_;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int32_t rank = ranks[i];
    if (rank == home) continue;
    const std::int32_t node = node_of_[rank];
    remote[0] += sign;
    if (node != home_node) {
      if (direct || node_seen_[node] != stamp_) {
        node_seen_[node] = stamp_;
        node_out[home_node] += sign;
        node_in[node] += sign;
        remote[1] += sign;
      }
      if (direct) continue;
    }
    const std::int32_t gateway = node * per_node + local;
    if (rank == gateway) continue;
    rank_out[gateway] += sign;
    rank_in[rank] += sign;
  }
}

double LinkCounts::busiest_rank(std::int64_t scenario, const LinkFactors& links, bool back) const {
  const std::int32_t* out = rank_.data() + scenario * 2 * num_ranks_;
  const std::int32_t* in = out + num_ranks_;
  return busiest_link(links, back ? in : out, back ? out : in, num_ranks_);
}

double LinkCounts::busiest_node(std::int64_t scenario, const LinkFactors& links, bool back) const {
  const std::int32_t* out = node_.data() + scenario * 2 * num_nodes_;
  const std::int32_t* in = out + num_nodes_;
  return busiest_link(links, back ? in : out, back ? out : in, num_nodes_);
}

}  // namespace moetuner
