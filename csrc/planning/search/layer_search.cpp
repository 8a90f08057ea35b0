#include "planning/search/layer_search.h"

#include <algorithm>

namespace moetuner {
namespace {

std::vector<std::int64_t> words_of_scenarios(const SearchProblem& problem) {
  std::vector<std::int64_t> words;
  for (std::int64_t s = 0; s < problem.num_scenarios; ++s) {
    words.push_back((problem.scenario_begin[s + 1] - problem.scenario_begin[s] + 63) / 64);
  }
  return words;
}

void add(std::int32_t* sums, const std::int32_t* counts, std::int64_t size) {
  for (std::int64_t s = 0; s < size; ++s) sums[s] += counts[s];
}

void take_away(std::int32_t* sums, const std::int32_t* counts, std::int64_t size) {
  for (std::int64_t s = 0; s < size; ++s) sums[s] -= counts[s];
}

}  // namespace

LayerSearch::LayerSearch(const SearchProblem& problem,
                         const SearchState& state,
                         std::int64_t layer,
                         const Surroundings& around)
    : problem_(problem),
      num_slots_(state.num_slots),
      around_(around),
      num_nodes_(problem.num_ranks / problem.ranks_per_node),
      num_scenarios_(problem.num_scenarios),
      stay_rank_(problem.stay_rank == nullptr ? nullptr
                                              : problem.stay_rank + layer * problem.num_experts),
      distinct_(problem.wire.rows == Rows::kPerRank),
      gateway_sets_(problem.wire.once_per_place()),
      tokens_(problem.num_experts, words_of_scenarios(problem)),
      load_(static_cast<std::size_t>(num_slots_ * problem.num_scenarios), 0),
      active_(load_),
      total_load_(static_cast<std::size_t>(num_slots_), 0.0),
      costs_(problem),
      rank_sets_(static_cast<std::size_t>(problem.num_ranks)),
      node_sets_(static_cast<std::size_t>(num_nodes_)) {
  for (std::int64_t s = 0; s < num_scenarios_; ++s) {
    for (std::int64_t e = 0; e < problem.num_experts; ++e) {
      const std::int64_t cell = (s * problem.num_layers + layer) * problem.num_experts + e;
      load_[e * num_scenarios_ + s] = problem.load[cell];
      active_[e * num_scenarios_ + s] = problem.active[cell];
      total_load_[e] += problem.load[cell] * problem.row_scale[s] * problem.weight[s];
    }
  }
  if (distinct_) choose_tokens(layer);
  if (around.home != nullptr) choose_homes(layer);
  if (around.next_ranks != nullptr) value_ends(layer);
  place({state.places + layer * num_slots_, state.places + (layer + 1) * num_slots_});
}

void LayerSearch::choose_tokens(std::int64_t layer) {
  for (std::int64_t s = 0; s < num_scenarios_; ++s) {
    for (std::int64_t t = problem_.scenario_begin[s]; t < problem_.scenario_begin[s + 1]; ++t) {
      const std::int16_t* ids =
          problem_.topk_ids + (t * problem_.num_layers + layer) * problem_.top_k;
      for (std::int64_t k = 0; k < problem_.top_k; ++k) {
        if (ids[k] < 0 || ids[k] >= problem_.num_experts) continue;
        tokens_.choose(ids[k], s, t - problem_.scenario_begin[s]);
      }
    }
  }
}

/// Homes as sets of tokens, and the tokens that end where a member is.
void LayerSearch::choose_homes(std::int64_t layer) {
  homes_.emplace(problem_.num_ranks + num_nodes_, words_of_scenarios(problem_));
  first_.assign(static_cast<std::size_t>(num_slots_ * num_scenarios_), 0);
  first_rows_.assign(static_cast<std::size_t>((problem_.num_ranks + num_nodes_) * num_scenarios_),
                     0);
  for (std::int64_t s = 0; s < num_scenarios_; ++s) {
    for (std::int64_t t = problem_.scenario_begin[s]; t < problem_.scenario_begin[s + 1]; ++t) {
      const std::int64_t index = t - problem_.scenario_begin[s];
      homes_->choose(around_.home[t], s, index);
      homes_->choose(problem_.num_ranks + node_of(around_.home[t]), s, index);
      const std::int16_t id = problem_.topk_ids[(t * problem_.num_layers + layer) * problem_.top_k];
      if (problem_.follow && id >= 0 && id < problem_.num_experts)
        ++first_[id * num_scenarios_ + s];
    }
  }
}

/// Seconds that the next layer's dispatch saves for each rank that a member may be on: tokens that
/// end there need no row to an expert there.
void LayerSearch::value_ends(std::int64_t layer) {
  const LinkRates& links = problem_.price.rates().both_ways;
  const double dispatch_share = problem_.price.rates().dispatch_share;
  const bool between = num_nodes_ > 1;
  const bool inside = !between || links.hops == Hops::kInTurn;
  const double rank_share = inside ? links.rank_row / static_cast<double>(problem_.num_ranks) : 0.0;
  const double node_share = between ? links.node_row / static_cast<double>(num_nodes_) : 0.0;
  const double rank_value = dispatch_share * (problem_.smoothing.rank_copies + rank_share);
  const double node_value = dispatch_share * (problem_.smoothing.node_copies + node_share);
  const std::int64_t per_node = problem_.ranks_per_node;
  end_value_.assign(static_cast<std::size_t>(num_slots_ * problem_.num_ranks), 0.0);
  std::vector<std::int64_t> ranks;
  std::vector<std::int64_t> nodes;
  const auto add_once = [](std::vector<std::int64_t>& seen, std::int64_t place) {
    if (std::find(seen.begin(), seen.end(), place) == seen.end()) seen.push_back(place);
  };
  for (std::int64_t s = 0; s < num_scenarios_; ++s) {
    const double weight = problem_.row_scale[s] * problem_.weight[s];
    for (std::int64_t t = problem_.scenario_begin[s]; t < problem_.scenario_begin[s + 1]; ++t) {
      const std::int16_t* ids =
          problem_.topk_ids + (t * problem_.num_layers + layer) * problem_.top_k;
      if (ids[0] < 0 || ids[0] >= problem_.num_experts) continue;
      ranks.clear();
      nodes.clear();
      for (std::int64_t k = 0; k < problem_.top_k; ++k) {
        const std::int16_t id = ids[problem_.top_k + k];  // the next layer's are beside
        if (id < 0 || id >= problem_.num_experts) continue;
        add_once(ranks, around_.next_ranks[id]);
        add_once(nodes, node_of(around_.next_ranks[id]));
      }
      double* values = end_value_.data() + ids[0] * problem_.num_ranks;
      for (const std::int64_t rank : ranks) values[rank] += weight * rank_value;
      for (const std::int64_t node : nodes) {
        for (std::int64_t i = 0; i < per_node; ++i) {
          values[node * per_node + i] += weight * node_value;
        }
      }
    }
  }
}

/// How tokens of a place become rows on its links; places are ranks, then nodes.
TokenSets::Rows LayerSearch::rows_of(std::int64_t place) const {
  if (!homes_) return {};
  const double share = problem_.follow ? problem_.price.rates().dispatch_share : 1.0;
  return {kLinkRow, static_cast<std::int32_t>(share * kLinkRow + 0.5), homes_->row(place)};
}

/// Rows that need not come back, because their token stays: those of its first expert.
void LayerSearch::leave_first_rows(std::int64_t place,
                                   std::int64_t out,
                                   std::int64_t in,
                                   std::int32_t* rows) {
  if (!homes_ || !problem_.follow) return;
  const std::int32_t back = kLinkRow - rows_of(place).per_kept;
  const std::int32_t* here = first_rows_.data() + place * num_scenarios_;
  const std::int32_t* leaves = first_.data() + out * num_scenarios_;
  const std::int32_t* comes = first_.data() + in * num_scenarios_;
  for (std::int64_t s = 0; s < num_scenarios_; ++s) {
    rows[s] -= back * (here[s] + comes[s] - leaves[s]);
  }
}

void LayerSearch::place(const std::vector<std::int32_t>& rank_of) {
  rank_of_ = rank_of;
  costs_.clear();
  num_moved_ = 0;
  next_saved_ = 0.0;
  std::fill(first_rows_.begin(), first_rows_.end(), 0);
  for (std::int64_t member = 0; member < num_slots_; ++member) {
    const std::int64_t rank = rank_of_[member];
    costs_.total(rank) += total_load_[member];
    num_moved_ += moved(member, rank);
    for (std::int64_t s = 0; s < num_scenarios_; ++s) {
      costs_.load(rank)[s] += load_[member * num_scenarios_ + s];
      costs_.active(rank)[s] += active_[member * num_scenarios_ + s];
      if (!homes_) continue;
      const std::int32_t first = first_[member * num_scenarios_ + s];
      first_rows_[rank * num_scenarios_ + s] += first;
      first_rows_[(problem_.num_ranks + node_of(rank)) * num_scenarios_ + s] += first;
    }
    if (!end_value_.empty()) next_saved_ += end_value_[member * problem_.num_ranks + rank];
  }
  for (std::int64_t rank = 0; rank < problem_.num_ranks; ++rank) fill_sets(rank);
  for (std::int64_t node = 0; node < num_nodes_; ++node) fill_node_sets(node);
  costs_.refresh_all();
  saved_ = next_saved_;
  cost_ = price();
}

/// Sets and hits of a rank; rows themselves are the hits where each travels alone.
void LayerSearch::fill_sets(std::int64_t rank) {
  if (!distinct_) {
    std::copy_n(costs_.load(rank), num_scenarios_, costs_.hits(rank));
    return;
  }
  std::vector<std::int32_t> members;
  for (std::int64_t e = 0; e < problem_.num_experts; ++e) {
    if (rank_of_[e] == rank) members.push_back(static_cast<std::int32_t>(e));
  }
  tokens_.fill(rank_sets_[rank], members);
  tokens_.rows(rank_sets_[rank], rows_of(rank), costs_.hits(rank));
  leave_first_rows(rank, 0, 0, costs_.hits(rank));
}

void LayerSearch::fill_node_sets(std::int64_t node) {
  std::int32_t* hits = costs_.node_hits(node);
  if (!gateway_sets_) {
    std::fill_n(hits, num_scenarios_, 0);
    for (std::int64_t i = 0; i < problem_.ranks_per_node; ++i) {
      add(hits, costs_.hits(node * problem_.ranks_per_node + i), num_scenarios_);
    }
    return;
  }
  std::vector<std::int32_t> members;
  for (std::int64_t e = 0; e < problem_.num_experts; ++e) {
    if (node_of(rank_of_[e]) == node) members.push_back(static_cast<std::int32_t>(e));
  }
  tokens_.fill(node_sets_[node], members);
  const std::int64_t place = problem_.num_ranks + node;
  tokens_.rows(node_sets_[node], rows_of(place), hits);
  leave_first_rows(place, 0, 0, hits);
}

void LayerSearch::move_rows(std::int64_t rank, std::int64_t out, std::int64_t in) {
  costs_.total(rank) += total_load_[in] - total_load_[out];
  const auto move = [&](const std::vector<std::int32_t>& counts, std::int32_t* sums) {
    const std::int32_t* leaves = counts.data() + out * num_scenarios_;
    const std::int32_t* comes = counts.data() + in * num_scenarios_;
    for (std::int64_t s = 0; s < num_scenarios_; ++s) sums[s] += comes[s] - leaves[s];
  };
  move(load_, costs_.load(rank));
  move(active_, costs_.active(rank));
}

double LayerSearch::propose(std::int64_t a, std::int64_t b) {
  member_[0] = a;
  member_[1] = b;
  for (int side = 0; side < 2; ++side) rank_[side] = rank_of_[member_[side]];
  costs_.save(rank_);
  moved_before_ = num_moved_;
  const std::int64_t nodes[2] = {node_of(rank_[0]), node_of(rank_[1])};
  const bool crosses = nodes[0] != nodes[1];
  for (int side = 0; side < 2; ++side) {
    const std::int64_t out = member_[side];
    const std::int64_t in = member_[1 - side];
    const std::int64_t rank = rank_[side];
    move_rows(rank, out, in);
    num_moved_ += moved(in, rank) - moved(out, rank);
    std::int32_t* hits = costs_.hits(rank);
    std::int32_t* node_hits = costs_.node_hits(nodes[side]);
    const bool sums = !gateway_sets_ && (crosses || distinct_);
    if (sums) take_away(node_hits, hits, num_scenarios_);
    if (distinct_) {
      tokens_.rows_after_swap(rank_sets_[rank], out, in, rows_of(rank), hits);
      leave_first_rows(rank, out, in, hits);
    } else {
      std::copy_n(costs_.load(rank), num_scenarios_, hits);
    }
    if (sums) add(node_hits, hits, num_scenarios_);
    if (gateway_sets_ && crosses) {
      const std::int64_t place = problem_.num_ranks + nodes[side];
      tokens_.rows_after_swap(node_sets_[nodes[side]], out, in, rows_of(place), node_hits);
      leave_first_rows(place, out, in, node_hits);
    }
  }
  costs_.refresh(nodes[0]);
  if (crosses) costs_.refresh(nodes[1]);
  next_saved_ = saved_;
  for (int side = 0; side < 2 && !end_value_.empty(); ++side) {
    const double* values = end_value_.data() + member_[side] * problem_.num_ranks;
    next_saved_ += values[rank_[1 - side]] - values[rank_[side]];
  }
  next_cost_ = price();
  return next_cost_;
}

void LayerSearch::accept() {
  std::swap(rank_of_[member_[0]], rank_of_[member_[1]]);
  cost_ = next_cost_;
  saved_ = next_saved_;
  if (!distinct_) return;
  for (int side = 0; side < 2 && homes_; ++side) {
    const std::int32_t* leaves = first_.data() + member_[side] * num_scenarios_;
    const std::int32_t* comes = first_.data() + member_[1 - side] * num_scenarios_;
    for (const std::int64_t place : {rank_[side], problem_.num_ranks + node_of(rank_[side])}) {
      std::int32_t* rows = first_rows_.data() + place * num_scenarios_;
      for (std::int64_t s = 0; s < num_scenarios_; ++s) rows[s] += comes[s] - leaves[s];
    }
  }
  for (const std::int64_t rank : rank_) fill_sets(rank);
  if (node_of(rank_[0]) == node_of(rank_[1])) return;
  for (const std::int64_t rank : rank_) fill_node_sets(node_of(rank));
}

void LayerSearch::reject() {
  costs_.restore();
  num_moved_ = moved_before_;
}

}  // namespace moetuner
