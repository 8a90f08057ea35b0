#include "planning/tally/replicas.h"

namespace moetuner {

Replicas::Replicas(const LayerSlots& slots)
    : layout_{slots.rule, slots.num_slots / slots.num_ranks, slots.ranks_per_node},
      rank_slots_(slots.rank_slots),
      num_experts_(slots.num_experts),
      begin_(static_cast<std::size_t>(slots.num_experts) + 1, 0),
      rank_of_(static_cast<std::size_t>(slots.num_slots)),
      lone_(static_cast<std::size_t>(slots.num_experts), -1) {
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
    rank_of_[p] = static_cast<std::int32_t>(p / layout_.slots_per_rank);
  }
  for (std::int64_t e = 0; e < slots.num_experts; ++e) {
    if (count(e) == 1) lone_[e] = static_cast<std::int32_t>(pick(e, 0, 0));
  }
}

std::int64_t Replicas::pick(std::int64_t expert, std::int64_t home, std::int64_t number) const {
  if (rank_slots_ != nullptr) return rank_slots_[home * num_experts_ + expert];
  return pick_slot(
      layout_, slots_.data() + begin_[expert], begin_[expert + 1] - begin_[expert], home, number);
}

}  // namespace moetuner
