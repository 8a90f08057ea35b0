#pragma once

#include <cstdint>
#include <vector>

namespace moetuner {

/// The rule that picks a replica: see `TallyArgs`. `slots` [count] in slot order; -1 when empty.
template <typename Slot>
std::int64_t pick_slot(const Slot* slots,
                       std::int64_t count,
                       std::int64_t slots_per_rank,
                       std::int64_t ranks_per_node,
                       std::int64_t home,
                       std::int64_t token) {
  if (count <= 1) return count == 1 ? slots[0] : -1;
  const std::int64_t home_node = home / ranks_per_node;
  const auto on_home_node = [&](Slot slot) {
    return slot / slots_per_rank / ranks_per_node == home_node;
  };
  std::int64_t same_node = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (slots[i] / slots_per_rank == home) return slots[i];
    same_node += on_home_node(slots[i]);
  }
  std::int64_t skip = token % (same_node > 0 ? same_node : count);
  for (std::int64_t i = 0; i < count; ++i) {
    if ((same_node == 0 || on_home_node(slots[i])) && skip-- == 0) return slots[i];
  }
  return slots[0];
}

/// The slots of one layer.
struct LayerSlots {
  const std::int32_t* experts;  // [P], -1: empty
  std::int64_t num_slots;
  std::int64_t num_experts;
  std::int64_t num_ranks;
  std::int64_t ranks_per_node;
};

/// Slots of every expert in one layer, and the rule that picks one of them.
class Replicas {
 public:
  explicit Replicas(const LayerSlots& slots);

  bool any() const { return any_; }

  std::int64_t count(std::int64_t expert) const { return begin_[expert + 1] - begin_[expert]; }

  /// Slot that serves `expert` for a token at `home`; -1 when the expert has none.
  std::int64_t pick(std::int64_t expert, std::int64_t home, std::int64_t token) const;

  /// The same from every home at once: of home g into slots[g * stride]. The expert has a slot.
  void pick_by_home(std::int64_t expert,
                    std::int64_t token,
                    std::int32_t* slots,
                    std::int64_t stride) const;

  std::int64_t rank_of(std::int64_t slot) const { return slot / slots_per_rank_; }

 private:
  std::int64_t slots_per_rank_;
  std::int64_t num_ranks_;
  std::int64_t ranks_per_node_;
  bool any_ = false;
  std::vector<std::int64_t> begin_;  // [E + 1], into slots_
  std::vector<std::int64_t> slots_;  // grouped by expert, in slot order
};

}  // namespace moetuner
