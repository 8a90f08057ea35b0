#include "planning/tally/replicas.h"

namespace moetuner {

Replicas::Replicas(const LayerSlots& slots)
    : layout_{slots.rule, slots.num_slots / slots.num_ranks, slots.ranks_per_node},
      num_ranks_(slots.num_ranks),
      rank_slots_(slots.rank_slots),
      num_experts_(slots.num_experts),
      begin_(static_cast<std::size_t>(slots.num_experts) + 1, 0) {
  const std::int32_t* experts = slots.experts;
  for (std::int64_t p = 0; p < slots.num_slots; ++p) {
    if (experts[p] >= 0) ++begin_[experts[p] + 1];
  }
  for (std::int64_t e = 0; e < slots.num_experts; ++e) {
    any_ = any_ || begin_[e + 1] > 1;
    begin_[e + 1] += begin_[e];
  }
  slots_.resize(static_cast<std::size_t>(begin_.back()));
  std::vector<std::int64_t> next(begin_.begin(), begin_.end() - 1);
  for (std::int64_t p = 0; p < slots.num_slots; ++p) {
    if (experts[p] >= 0) slots_[next[experts[p]]++] = p;
  }
}

std::int64_t Replicas::pick(std::int64_t expert, std::int64_t home, std::int64_t number) const {
  if (rank_slots_ != nullptr) return rank_slots_[home * num_experts_ + expert];
  return pick_slot(
      layout_, slots_.data() + begin_[expert], begin_[expert + 1] - begin_[expert], home, number);
}

void Replicas::pick_by_home(std::int64_t expert,
                            std::int64_t number,
                            std::int32_t* slots,
                            std::int64_t stride) const {
  if (layout_.rule == ReplicaRule::kMoetuner) {
    return nearest_by_home(expert, number, slots, stride);
  }
  for (std::int64_t home = 0; home < num_ranks_; ++home) {
    slots[home * stride] = static_cast<std::int32_t>(pick(expert, home, number));
  }
}

/// `nearest_slot` from every home: the slots of a node are neighbours.
void Replicas::nearest_by_home(std::int64_t expert,
                               std::int64_t number,
                               std::int32_t* slots,
                               std::int64_t stride) const {
  const std::int64_t* own = slots_.data() + begin_[expert];
  const std::int64_t* end = slots_.data() + begin_[expert + 1];
  const auto fill = [&](std::int64_t first, std::int64_t count, std::int64_t slot) {
    for (std::int64_t home = first; home < first + count; ++home) {
      slots[home * stride] = static_cast<std::int32_t>(slot);
    }
  };
  fill(0, num_ranks_, own[number % (end - own)]);
  while (own < end) {
    const std::int64_t first = rank_of(*own) / layout_.ranks_per_node * layout_.ranks_per_node;
    const std::int64_t* of_node = own;
    while (own < end && rank_of(*own) < first + layout_.ranks_per_node) ++own;
    fill(first, layout_.ranks_per_node, of_node[number % (own - of_node)]);
    for (const std::int64_t* slot = own; slot-- > of_node;) fill(rank_of(*slot), 1, *slot);
  }
}

}  // namespace moetuner
