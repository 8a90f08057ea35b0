#pragma once

#include <cstdint>

namespace moetuner {

/// Experts of one layer shared out over ranks with equally many slots.
struct BalanceArgs {
  const double* load;     // [E], any unit, >= 0
  std::int32_t* rank_of;  // [E]
  std::int64_t num_experts;
  std::int64_t num_ranks;
  std::int64_t slots_per_rank;
};

/// Longest processing time first: heaviest expert to the lightest rank that has a free slot.
///
/// Ties go to the lower expert id and the lower rank. Overwrites `rank_of`.
void pack_by_load(const BalanceArgs& args);

/// Swaps experts of the heaviest rank with lighter ones elsewhere while the heaviest load falls.
///
/// Reads and improves `rank_of`; the sizes of the ranks stay as they are.
void refine_by_swaps(const BalanceArgs& args, std::int64_t max_swaps);

}  // namespace moetuner
