#include "planning/tally/replicas.h"

namespace moetuner {

Replicas::Replicas(const LayerSlots& slots)
    : slots_per_rank_(slots.num_slots / slots.num_ranks),
      num_ranks_(slots.num_ranks),
      ranks_per_node_(slots.ranks_per_node),
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

std::int64_t Replicas::pick(std::int64_t expert, std::int64_t home, std::int64_t token) const {
  return pick_slot(slots_.data() + begin_[expert],
                   begin_[expert + 1] - begin_[expert],
                   slots_per_rank_,
                   ranks_per_node_,
                   home,
                   token);
}

void Replicas::pick_by_home(std::int64_t expert,
                            std::int64_t token,
                            std::int32_t* slots,
                            std::int64_t stride) const {
  const std::int64_t* own = slots_.data() + begin_[expert];
  const std::int64_t* end = slots_.data() + begin_[expert + 1];
  const auto fill = [&](std::int64_t first, std::int64_t count, std::int64_t slot) {
    for (std::int64_t home = first; home < first + count; ++home) {
      slots[home * stride] = static_cast<std::int32_t>(slot);
    }
  };
  fill(0, num_ranks_, own[token % (end - own)]);
  while (own < end) {  // slots of a node are neighbours
    const std::int64_t first = rank_of(*own) / ranks_per_node_ * ranks_per_node_;
    const std::int64_t* of_node = own;
    while (own < end && rank_of(*own) < first + ranks_per_node_) ++own;
    fill(first, ranks_per_node_, of_node[token % (own - of_node)]);
    for (const std::int64_t* slot = own; slot-- > of_node;) fill(rank_of(*slot), 1, *slot);
  }
}

}  // namespace moetuner
