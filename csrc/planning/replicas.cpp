#include "replicas.h"

namespace moetuner {

Replicas::Replicas(const TallyArgs& args, std::int64_t layer)
    : slots_per_rank_(args.num_slots / args.num_ranks),
      ranks_per_node_(args.ranks_per_node),
      begin_(static_cast<std::size_t>(args.num_experts) + 1, 0) {
  const std::int32_t* experts = args.slot_experts + layer * args.num_slots;
  for (std::int64_t p = 0; p < args.num_slots; ++p) {
    if (experts[p] >= 0) ++begin_[experts[p] + 1];
  }
  for (std::int64_t e = 0; e < args.num_experts; ++e) {
    any_ = any_ || begin_[e + 1] > 1;
    begin_[e + 1] += begin_[e];
  }
  slots_.resize(static_cast<std::size_t>(begin_.back()));
  std::vector<std::int64_t> next(begin_.begin(), begin_.end() - 1);
  for (std::int64_t p = 0; p < args.num_slots; ++p) {
    if (experts[p] >= 0) slots_[next[experts[p]]++] = p;
  }
}

std::int64_t Replicas::pick(std::int64_t expert, std::int64_t home, std::int64_t token) const {
  const std::int64_t* first = slots_.data() + begin_[expert];
  const std::int64_t* last = slots_.data() + begin_[expert + 1];
  const std::int64_t count = last - first;
  if (count <= 1) return count == 1 ? *first : -1;

  const std::int64_t home_node = home / ranks_per_node_;
  std::int64_t same_node = 0;
  for (const std::int64_t* slot = first; slot != last; ++slot) {
    if (rank_of(*slot) == home) return *slot;
    same_node += rank_of(*slot) / ranks_per_node_ == home_node;
  }
  std::int64_t skip = token % (same_node > 0 ? same_node : count);
  for (const std::int64_t* slot = first; slot != last; ++slot) {
    const bool candidate = same_node == 0 || rank_of(*slot) / ranks_per_node_ == home_node;
    if (candidate && skip-- == 0) return *slot;
  }
  return *first;
}

}  // namespace moetuner
