#include "planning/search/token_layer.h"

#include <algorithm>

namespace moetuner {

TokenLayer::TokenLayer(const SearchProblem& problem,
                       const SearchState& state,
                       std::int64_t layer,
                       const std::int32_t* home,
                       const std::int32_t* next_ranks,
                       const SourceRows& rows)
    : problem_(problem),
      num_slots_(state.num_slots),
      slots_per_rank_(num_slots_ / problem.num_ranks),
      replica_layout_{problem.replica_rule, slots_per_rank_, problem.ranks_per_node},
      numbers_(problem.replica_rule, choices_of(problem, layer), rows),
      home_(home),
      has_next_(next_ranks != nullptr),
      distinct_(problem.wire.rows != Rows::kPerExpert),
      scenario_of_(static_cast<std::size_t>(problem.num_tokens)),
      tokens_of_(static_cast<std::size_t>(problem.num_experts)),
      slots_of_(static_cast<std::size_t>(problem.num_experts)),
      slots_(state.places + layer * num_slots_, state.places + (layer + 1) * num_slots_),
      picked_(static_cast<std::size_t>(problem.num_tokens * problem.top_k), -1),
      counts_{std::vector<std::int32_t>(
                  static_cast<std::size_t>(problem.num_scenarios * num_slots_), 0),
              LinkCounts(
                  problem.num_scenarios, problem.num_ranks, problem.ranks_per_node, problem.wire),
              LinkCounts(
                  problem.num_scenarios, problem.num_ranks, problem.ranks_per_node, problem.wire),
              LinkCounts(
                  problem.num_scenarios, problem.num_ranks, problem.ranks_per_node, problem.wire)},
      rank_of_(static_cast<std::size_t>(num_slots_)),
      next_begin_{0},
      rank_seen_(static_cast<std::size_t>(problem.num_ranks), 0),
      saved_(counts_) {
  for (std::int64_t p = 0; p < num_slots_; ++p) {
    rank_of_[p] = static_cast<std::int32_t>(p / slots_per_rank_);
    if (slots_[p] >= 0) slots_of_[slots_[p]].push_back(static_cast<std::int32_t>(p));
  }
  for (std::int64_t s = 0; s < problem.num_scenarios; ++s) {
    for (std::int64_t t = problem.scenario_begin[s]; t < problem.scenario_begin[s + 1]; ++t) {
      scenario_of_[t] = s;
      const std::int16_t* chosen =
          problem.topk_ids + (t * problem.num_layers + layer) * problem.top_k;
      ids_.insert(ids_.end(), chosen, chosen + problem.top_k);
      for (std::int64_t k = 0; k < problem.top_k; ++k) {
        const std::int16_t id = ids(t)[k];
        if (id < 0 || id >= problem.num_experts) continue;
        tokens_of_[id].push_back(static_cast<std::int32_t>(t));
        picked_[t * problem.top_k + k] = pick(t, k);
      }
      for (std::int64_t k = 0; k < problem.top_k; ++k) {
        const std::int32_t slot = picked_[t * problem.top_k + k];
        if (slot >= 0) ++counts_.slot_rows[s * num_slots_ + slot];
      }
      visit(t, after_);
      const auto count = static_cast<std::int64_t>(after_.ranks.size());
      counts_.dispatch.add(s, home_[t], after_.ranks.data(), count, 1);
      counts_.combine.add(s, after_.end, after_.ranks.data(), count, 1);
      if (!has_next_) continue;
      distinct(next_ranks + t * problem.top_k, before_.ranks);
      next_distinct_.insert(next_distinct_.end(), before_.ranks.begin(), before_.ranks.end());
      next_begin_.push_back(static_cast<std::int32_t>(next_distinct_.size()));
      add_next(t, s, after_.end, 1);
    }
  }
  cost_ = price();
}

bool TokenLayer::holds(std::int64_t rank, std::int32_t expert) const {
  const auto first = slots_.begin() + rank * slots_per_rank_;
  return std::find(first, first + slots_per_rank_, expert) != first + slots_per_rank_;
}

/// The slot of a token's choice `k`, which is no padding.
std::int32_t TokenLayer::pick(std::int64_t t, std::int64_t k) const {
  const std::int16_t expert = ids(t)[k];
  const auto& slots = slots_of_[expert];
  return static_cast<std::int32_t>(pick_slot(replica_layout_,
                                             slots.data(),
                                             static_cast<std::int64_t>(slots.size()),
                                             home_[t],
                                             numbers_.of(t, k, expert)));
}

/// Of `ranks` [K], -1 for padding, those that rows go to.
void TokenLayer::distinct(const std::int32_t* ranks, std::vector<std::int32_t>& found) {
  found.clear();
  ++stamp_;
  for (std::int64_t k = 0; k < problem_.top_k; ++k) {
    const std::int32_t rank = ranks[k];
    if (rank < 0) continue;
    if (distinct_ && rank_seen_[rank] == stamp_) continue;
    rank_seen_[rank] = stamp_;
    found.push_back(rank);
  }
}

void TokenLayer::visit(std::int64_t t, Visit& visit) {
  const std::int32_t* slots = picked_.data() + t * problem_.top_k;
  visit.ranks.clear();
  visit.end = problem_.follow && slots[0] >= 0 ? rank_of_[slots[0]] : home_[t];
  ++stamp_;
  for (std::int64_t k = 0; k < problem_.top_k; ++k) {
    if (slots[k] < 0) continue;
    const std::int32_t rank = rank_of_[slots[k]];
    if (distinct_ && rank_seen_[rank] == stamp_) continue;
    rank_seen_[rank] = stamp_;
    visit.ranks.push_back(rank);
  }
}

/// Whether two visits cost the same; `b` was the last to be seen.
bool TokenLayer::same_ranks(const Visit& a, const Visit& b) {
  if (!distinct_) return a.ranks == b.ranks;
  return a.ranks.size() == b.ranks.size() &&
         std::all_of(a.ranks.begin(), a.ranks.end(), [&](std::int32_t rank) {
           return rank_seen_[rank] == stamp_;
         });
}

void TokenLayer::add_next(std::int64_t t, std::int64_t s, std::int32_t end, std::int32_t sign) {
  const std::int32_t first = next_begin_[t];
  counts_.next.add(s, end, next_distinct_.data() + first, next_begin_[t + 1] - first, sign);
}

double TokenLayer::price_scenario(std::int64_t s) const {
  const LayerPrice& price = problem_.price;
  const Smoothing& smoothing = problem_.smoothing;
  const double scale = problem_.row_scale[s];
  double compute = 0.0;
  double peak = 0.0;
  double sum = 0.0;
  double squares = 0.0;
  const std::int32_t* slot = counts_.slot_rows.data() + s * num_slots_;
  for (std::int64_t rank = 0; rank < problem_.num_ranks; ++rank) {
    std::int64_t rows = 0;
    std::int64_t active = 0;
    for (std::int64_t i = 0; i < slots_per_rank_; ++i, ++slot) {
      rows += *slot;
      active += *slot > 0;
    }
    const double scaled = static_cast<double>(rows) * scale;
    compute = std::max(compute, price.compute(rank, scaled, static_cast<double>(active)));
    peak = std::max(peak, scaled / price.row_speed(rank));
    sum += static_cast<double>(rows);
    squares += static_cast<double>(rows * rows);
  }
  const double mean = sum / static_cast<double>(problem_.num_ranks);
  const double variance =
      mean > 0 ? (squares / static_cast<double>(problem_.num_ranks) - mean * mean) / mean : 0.0;
  double seconds =
      price.with_launches(compute) + smoothing.peak * peak + smoothing.variance * variance * scale;
  double rank_copies = 0.0;
  double node_copies = 0.0;
  const Rates& rates = price.rates();
  // A direction takes its share of a row both ways.
  const auto exchange = [&](const LinkCounts& links, const LinkRates& direction, double share) {
    const bool back = &links == &counts_.combine;
    const double rank = links.busiest_rank(s, rates.rank_links, back);
    const double node = links.busiest_node(s, rates.node_links, back);
    seconds += share * scale * transfer_seconds(rates.both_ways, rank, node);
    seconds += latency_seconds(direction, rank, node);
    rank_copies += share * links.remote_ranks(s);
    node_copies += share * links.remote_nodes(s);
  };
  const double out = rates.dispatch_share;
  exchange(counts_.dispatch, rates.dispatch, out);
  exchange(counts_.combine, rates.combine, 1.0 - out);
  if (has_next_) exchange(counts_.next, rates.dispatch, out);
  return seconds +
         scale * (smoothing.rank_copies * rank_copies + smoothing.node_copies * node_copies);
}

double TokenLayer::price() const {
  double seconds = 0.0;
  for (std::int64_t s = 0; s < problem_.num_scenarios; ++s) {
    seconds += problem_.weight[s] * price_scenario(s);
  }
  if (problem_.smoothing.pooled == 0.0) return seconds;
  double peak = 0.0;
  for (std::int64_t rank = 0; rank < problem_.num_ranks; ++rank) {
    double rows = 0.0;
    for (std::int64_t s = 0; s < problem_.num_scenarios; ++s) {
      const std::int32_t* slot = counts_.slot_rows.data() + s * num_slots_ + rank * slots_per_rank_;
      std::int64_t here = 0;
      for (std::int64_t i = 0; i < slots_per_rank_; ++i) here += slot[i];
      rows += static_cast<double>(here) * problem_.row_scale[s] * problem_.weight[s];
    }
    peak = std::max(peak, rows / problem_.price.row_speed(rank));
  }
  return seconds + problem_.smoothing.pooled * peak;
}

void TokenLayer::list_slots(std::int32_t expert, std::int64_t slot, bool add) {
  auto& slots = slots_of_[expert];
  const auto value = static_cast<std::int32_t>(slot);
  const auto at = std::lower_bound(slots.begin(), slots.end(), value);
  if (add) {
    slots.insert(at, value);
  } else {
    slots.erase(at);
  }
}

void TokenLayer::put(std::int64_t slot, std::int32_t expert) {
  if (slots_[slot] >= 0) list_slots(slots_[slot], slot, false);
  slots_[slot] = expert;
  if (expert >= 0) list_slots(expert, slot, true);
}

/// Picks anew for a token that chose `e` or `f`.
void TokenLayer::repick(std::int64_t t, std::int32_t e, std::int32_t f) {
  const std::int64_t s = scenario_of_[t];
  std::int32_t* picked = picked_.data() + t * problem_.top_k;
  std::int32_t* rows = counts_.slot_rows.data() + s * num_slots_;
  proposal_.tokens.push_back(static_cast<std::int32_t>(t));
  proposal_.picked.insert(proposal_.picked.end(), picked, picked + problem_.top_k);
  visit(t, before_);
  for (std::int64_t k = 0; k < problem_.top_k; ++k) {
    const std::int16_t id = ids(t)[k];
    if (id < 0 || (id != e && id != f)) continue;
    --rows[picked[k]];
    picked[k] = pick(t, k);
    ++rows[picked[k]];
  }
  visit(t, after_);
  const bool same = same_ranks(before_, after_);
  const auto was = static_cast<std::int64_t>(before_.ranks.size());
  const auto now = static_cast<std::int64_t>(after_.ranks.size());
  if (!same) {
    counts_.dispatch.add(s, home_[t], before_.ranks.data(), was, -1);
    counts_.dispatch.add(s, home_[t], after_.ranks.data(), now, 1);
  }
  if (!same || before_.end != after_.end) {
    counts_.combine.add(s, before_.end, before_.ranks.data(), was, -1);
    counts_.combine.add(s, after_.end, after_.ranks.data(), now, 1);
  }
  if (has_next_ && before_.end != after_.end) {
    add_next(t, s, before_.end, -1);
    add_next(t, s, after_.end, 1);
  }
}

double TokenLayer::propose(std::int64_t p,
                           std::int32_t expert_p,
                           std::int64_t q,
                           std::int32_t expert_q) {
  saved_ = counts_;
  proposal_.tokens.clear();
  proposal_.picked.clear();
  proposal_.slot[0] = p;
  proposal_.slot[1] = q;
  proposal_.before[0] = slots_[p];
  proposal_.before[1] = q >= 0 ? slots_[q] : -1;
  // At most two experts gain or lose a slot: those that p held and holds.
  const std::int32_t e = slots_[p];
  const std::int32_t f = expert_p;
  put(p, expert_p);
  if (q >= 0) put(q, expert_q);
  if (e >= 0) {
    for (const std::int32_t t : tokens_of_[e]) repick(t, e, f);
  }
  if (f >= 0) {
    for (const std::int32_t t : tokens_of_[f]) {
      const std::int16_t* chosen = ids(t);
      if (e < 0 || std::find(chosen, chosen + problem_.top_k, e) == chosen + problem_.top_k) {
        repick(t, e, f);
      }
    }
  }
  proposal_.cost = price();
  return proposal_.cost;
}

void TokenLayer::accept() { cost_ = proposal_.cost; }

void TokenLayer::reject() {
  put(proposal_.slot[0], proposal_.before[0]);
  if (proposal_.slot[1] >= 0) put(proposal_.slot[1], proposal_.before[1]);
  for (std::size_t i = 0; i < proposal_.tokens.size(); ++i) {
    std::copy_n(proposal_.picked.begin() + static_cast<std::int64_t>(i) * problem_.top_k,
                problem_.top_k,
                picked_.begin() + proposal_.tokens[i] * problem_.top_k);
  }
  std::swap(counts_, saved_);
}

}  // namespace moetuner
