#include "planning/search/token_layer.h"

#include "planning/tally/replicas.h"

#include <algorithm>

namespace moetuner {

TokenLayer::TokenLayer(const TokenSearchArgs& args,
                       std::int64_t layer,
                       const std::int32_t* home,
                       const std::int32_t* next_ranks)
    : args_(args),
      layer_(layer),
      slots_per_rank_(args.num_slots / args.num_ranks),
      home_(home),
      has_next_(next_ranks != nullptr),
      scenario_of_(static_cast<std::size_t>(args.num_tokens)),
      tokens_of_(static_cast<std::size_t>(args.num_experts)),
      slots_of_(static_cast<std::size_t>(args.num_experts)),
      slots_(args.slot_experts + layer * args.num_slots,
             args.slot_experts + (layer + 1) * args.num_slots),
      picked_(static_cast<std::size_t>(args.num_tokens * args.top_k), -1),
      counts_{std::vector<std::int32_t>(
                  static_cast<std::size_t>(args.num_scenarios * args.num_slots), 0),
              LinkCounts(args.num_scenarios, args.num_ranks, args.ranks_per_node, args.wire),
              LinkCounts(args.num_scenarios, args.num_ranks, args.ranks_per_node, args.wire),
              LinkCounts(args.num_scenarios, args.num_ranks, args.ranks_per_node, args.wire)},
      rank_of_(static_cast<std::size_t>(args.num_slots)),
      next_begin_{0},
      rank_seen_(static_cast<std::size_t>(args.num_ranks), 0),
      saved_(counts_) {
  for (std::int64_t p = 0; p < args.num_slots; ++p) {
    rank_of_[p] = static_cast<std::int32_t>(p / slots_per_rank_);
    if (slots_[p] >= 0) slots_of_[slots_[p]].push_back(static_cast<std::int32_t>(p));
  }
  for (std::int64_t s = 0; s < args.num_scenarios; ++s) {
    for (std::int64_t t = args.scenario_begin[s]; t < args.scenario_begin[s + 1]; ++t) {
      scenario_of_[t] = s;
      const std::int16_t* chosen = args.topk_ids + (t * args.num_layers + layer) * args.top_k;
      ids_.insert(ids_.end(), chosen, chosen + args.top_k);
      for (std::int64_t k = 0; k < args.top_k; ++k) {
        const std::int16_t id = ids(t)[k];
        if (id < 0 || id >= args.num_experts) continue;
        tokens_of_[id].push_back(static_cast<std::int32_t>(t));
        picked_[t * args.top_k + k] = pick(id, home_[t], args.token[t]);
      }
      for (std::int64_t k = 0; k < args.top_k; ++k) {
        const std::int32_t slot = picked_[t * args.top_k + k];
        if (slot >= 0) ++counts_.slot_rows[s * args.num_slots + slot];
      }
      visit(t, after_);
      const auto count = static_cast<std::int64_t>(after_.ranks.size());
      counts_.dispatch.add(s, home_[t], after_.ranks.data(), count, 1);
      counts_.combine.add(s, after_.end, after_.ranks.data(), count, 1);
      if (!has_next_) continue;
      distinct(next_ranks + t * args.top_k, before_.ranks);
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

std::int32_t TokenLayer::pick(std::int32_t expert, std::int64_t home, std::int64_t token) const {
  const auto& slots = slots_of_[expert];
  return static_cast<std::int32_t>(pick_slot(slots.data(),
                                             static_cast<std::int64_t>(slots.size()),
                                             slots_per_rank_,
                                             args_.ranks_per_node,
                                             home,
                                             token));
}

/// Of `ranks` [K], -1 for padding, those that rows go to.
void TokenLayer::distinct(const std::int32_t* ranks, std::vector<std::int32_t>& found) {
  found.clear();
  ++stamp_;
  for (std::int64_t k = 0; k < args_.top_k; ++k) {
    const std::int32_t rank = ranks[k];
    if (rank < 0) continue;
    if (args_.wire != Wire::kPerExpert && rank_seen_[rank] == stamp_) continue;
    rank_seen_[rank] = stamp_;
    found.push_back(rank);
  }
}

void TokenLayer::visit(std::int64_t t, Visit& visit) {
  const std::int32_t* slots = picked_.data() + t * args_.top_k;
  visit.ranks.clear();
  visit.end = args_.follow && slots[0] >= 0 ? rank_of_[slots[0]] : home_[t];
  ++stamp_;
  for (std::int64_t k = 0; k < args_.top_k; ++k) {
    if (slots[k] < 0) continue;
    const std::int32_t rank = rank_of_[slots[k]];
    if (args_.wire != Wire::kPerExpert && rank_seen_[rank] == stamp_) continue;
    rank_seen_[rank] = stamp_;
    visit.ranks.push_back(rank);
  }
}

/// Whether two visits cost the same; `b` was the last to be seen.
bool TokenLayer::same_ranks(const Visit& a, const Visit& b) {
  if (args_.wire == Wire::kPerExpert) return a.ranks == b.ranks;
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
  const SearchWeights& w = args_.weights;
  const double scale = args_.row_scale[s];
  double compute = 0.0;
  double peak = 0.0;
  double sum = 0.0;
  double squares = 0.0;
  const std::int32_t* slot = counts_.slot_rows.data() + s * args_.num_slots;
  for (std::int64_t rank = 0; rank < args_.num_ranks; ++rank) {
    std::int64_t rows = 0;
    std::int64_t active = 0;
    for (std::int64_t i = 0; i < slots_per_rank_; ++i, ++slot) {
      rows += *slot;
      active += *slot > 0;
    }
    const double scaled = static_cast<double>(rows) * scale;
    compute =
        std::max(compute,
                 std::max(scaled * w.row_compute, static_cast<double>(active) * w.expert_compute) /
                     args_.rank_speed[rank]);
    peak = std::max(peak, scaled / args_.rank_speed[rank]);
    sum += static_cast<double>(rows);
    squares += static_cast<double>(rows * rows);
  }
  const double mean = sum / static_cast<double>(args_.num_ranks);
  const double variance =
      mean > 0 ? (squares / static_cast<double>(args_.num_ranks) - mean * mean) / mean : 0.0;
  double seconds = compute + w.smooth_peak * peak + w.smooth_variance * variance * scale;
  double rank_copies = 0.0;
  double node_copies = 0.0;
  const auto exchange = [&](const LinkCounts& links, double share) {
    const double rank = links.busiest_rank(s);
    const double node = links.busiest_node(s);
    seconds += share * scale * std::max(rank * w.rank_row, node * w.node_row);
    seconds += 0.5 * (node > 0 ? w.node_latency : rank > 0 ? w.rank_latency : 0.0);
    rank_copies += share * links.remote_ranks(s);
    node_copies += share * links.remote_nodes(s);
  };
  exchange(counts_.dispatch, args_.dispatch_share);
  exchange(counts_.combine, 1.0 - args_.dispatch_share);
  if (has_next_) exchange(counts_.next, args_.dispatch_share);
  return seconds + scale * (w.smooth_rank_hit * rank_copies + w.smooth_node_hit * node_copies);
}

double TokenLayer::price() const {
  double seconds = 0.0;
  for (std::int64_t s = 0; s < args_.num_scenarios; ++s) {
    seconds += args_.weight[s] * price_scenario(s);
  }
  if (args_.weights.smooth_pooled == 0.0) return seconds;
  double peak = 0.0;
  for (std::int64_t rank = 0; rank < args_.num_ranks; ++rank) {
    double rows = 0.0;
    for (std::int64_t s = 0; s < args_.num_scenarios; ++s) {
      const std::int32_t* slot =
          counts_.slot_rows.data() + s * args_.num_slots + rank * slots_per_rank_;
      std::int64_t here = 0;
      for (std::int64_t i = 0; i < slots_per_rank_; ++i) here += slot[i];
      rows += static_cast<double>(here) * args_.row_scale[s] * args_.weight[s];
    }
    peak = std::max(peak, rows / args_.rank_speed[rank]);
  }
  return seconds + args_.weights.smooth_pooled * peak;
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
  std::int32_t* picked = picked_.data() + t * args_.top_k;
  std::int32_t* rows = counts_.slot_rows.data() + s * args_.num_slots;
  proposal_.tokens.push_back(static_cast<std::int32_t>(t));
  proposal_.picked.insert(proposal_.picked.end(), picked, picked + args_.top_k);
  visit(t, before_);
  for (std::int64_t k = 0; k < args_.top_k; ++k) {
    const std::int16_t id = ids(t)[k];
    if (id < 0 || (id != e && id != f)) continue;
    --rows[picked[k]];
    picked[k] = pick(id, home_[t], args_.token[t]);
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
      if (e < 0 || std::find(chosen, chosen + args_.top_k, e) == chosen + args_.top_k) {
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
    std::copy_n(proposal_.picked.begin() + static_cast<std::int64_t>(i) * args_.top_k,
                args_.top_k,
                picked_.begin() + proposal_.tokens[i] * args_.top_k);
  }
  std::swap(counts_, saved_);
}

}  // namespace moetuner
