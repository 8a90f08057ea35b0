#pragma once

#include "moetuner/planning/replica_rule.h"

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace moetuner {

/// How slots lie on ranks and nodes, and who chooses among them.
struct ReplicaLayout {
  ReplicaRule rule;
  std::int64_t slots_per_rank;
  std::int64_t ranks_per_node;
};

/// The slot on `home`, else in turn one of those on its node, else one of all.
template <typename Slot>
std::int64_t nearest_slot(const ReplicaLayout& layout,
                          const Slot* slots,
                          std::int64_t count,
                          std::int64_t home,
                          std::int64_t number) {
  const std::int64_t home_node = home / layout.ranks_per_node;
  const auto on_home_node = [&](Slot slot) {
    return slot / layout.slots_per_rank / layout.ranks_per_node == home_node;
  };
  std::int64_t same_node = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (slots[i] / layout.slots_per_rank == home) return slots[i];
    same_node += on_home_node(slots[i]);
  }
  std::int64_t skip = number % (same_node > 0 ? same_node : count);
  for (std::int64_t i = 0; i < count; ++i) {
    if ((same_node == 0 || on_home_node(slots[i])) && skip-- == 0) return slots[i];
  }
  return slots[0];
}

/// The slot that SGLang's `home` has for an expert, but that ranks with no replica near them share
/// all of them in order, where SGLang deals them out at random: `Replicas` may know that.
template <typename Slot>
std::int64_t static_slot(const ReplicaLayout& layout,
                         const Slot* slots,
                         std::int64_t count,
                         std::int64_t home) {
  std::int64_t same_node = 0;
  std::int64_t first = -1;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t rank = slots[i] / layout.slots_per_rank;
    if (rank == home) return slots[i];
    if (rank / layout.ranks_per_node != home / layout.ranks_per_node) continue;
    if (same_node++ == 0) first = slots[i];
  }
  return 0 < same_node && same_node < count ? first : slots[home % count];
}

/// The replica for a token of rank `home`; of `slots` [count] in slot order, -1 when empty.
/// `number` is what the rule counts by: see `ReplicaNumbers`.
template <typename Slot>
std::int64_t pick_slot(const ReplicaLayout& layout,
                       const Slot* slots,
                       std::int64_t count,
                       std::int64_t home,
                       std::int64_t number) {
  if (count <= 1) return count == 1 ? slots[0] : -1;
  switch (layout.rule) {
    case ReplicaRule::kMoetuner:
      return nearest_slot(layout, slots, count, home, number);
    case ReplicaRule::kSglangStatic:
      return static_slot(layout, slots, count, home);
    case ReplicaRule::kVllm:
    case ReplicaRule::kSglangDynamic:
      return slots[number % count];
    case ReplicaRule::kVllmAscend:
      return slots[home % count];
    case ReplicaRule::kTensorrtLlm:
      return slots[(number + home) % count];
  }
  throw std::invalid_argument("pick_slot: no such replica rule");
}

/// The slots of one layer.
struct LayerSlots {
  const std::int32_t* experts;  // [P], -1: empty
  std::int64_t num_slots;
  std::int64_t num_experts;
  std::int64_t num_ranks;
  std::int64_t ranks_per_node;
  ReplicaRule rule;
  const std::int32_t* rank_slots;  // [G, E], slot that each rank has for each expert; or null
};

/// Slots of every expert in one layer, and the rule that picks one of them.
class Replicas {
 public:
  explicit Replicas(const LayerSlots& slots);

  bool any() const { return any_; }

  std::int64_t count(std::int64_t expert) const { return begin_[expert + 1] - begin_[expert]; }

  /// Slot that serves `expert` for a token at `home`; -1 when the expert has none.
  std::int64_t pick(std::int64_t expert, std::int64_t home, std::int64_t number) const;

  /// The only slot that a token of any home finds `expert` in; -1 where there are more, or none.
  std::int64_t lone(std::int64_t expert) const { return lone_[expert]; }

  /// Slots of `expert`, `count` of them in order.
  const std::int64_t* slots(std::int64_t expert) const { return slots_.data() + begin_[expert]; }

  /// One of all slots of a replicated expert.
  std::int64_t in_turn(std::int64_t expert, std::int64_t number) const {
    return slots(expert)[number % count(expert)];
  }

  std::int64_t rank_of(std::int64_t slot) const { return rank_of_[slot]; }

 private:
  ReplicaLayout layout_;
  const std::int32_t* rank_slots_;
  std::int64_t num_experts_;
  bool any_ = false;
  std::vector<std::int64_t> begin_;    // [E + 1], into slots_
  std::vector<std::int64_t> slots_;    // grouped by expert, in slot order
  std::vector<std::int32_t> rank_of_;  // [P]; division is slow
  std::vector<std::int32_t> lone_;     // [E]
};

}  // namespace moetuner
