#pragma once

#include "moetuner/tally.h"

#include <cstdint>
#include <vector>

namespace moetuner {

/// Slots of every expert in one layer, and the rule that picks one of them.
class Replicas {
 public:
  Replicas(const TallyArgs& args, std::int64_t layer);

  bool any() const { return any_; }

  std::int64_t count(std::int64_t expert) const { return begin_[expert + 1] - begin_[expert]; }

  /// Slot that serves `expert` for a token at `home`; -1 when the expert has none.
  std::int64_t pick(std::int64_t expert, std::int64_t home, std::int64_t token) const;

  std::int64_t rank_of(std::int64_t slot) const { return slot / slots_per_rank_; }

 private:
  std::int64_t slots_per_rank_;
  std::int64_t ranks_per_node_;
  bool any_ = false;
  std::vector<std::int64_t> begin_;  // [E + 1], into slots_
  std::vector<std::int64_t> slots_;  // grouped by expert, in slot order
};

}  // namespace moetuner
