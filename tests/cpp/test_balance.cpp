#include "harness.h"
#include "moetuner/planning/balance.h"

#include <vector>

using namespace moetuner;

TEST(heavy_experts_go_first_to_the_lightest_rank) {
  const double load[] = {5, 4, 3, 3, 3, 0};
  std::vector<std::int32_t> ranks(6, -1);
  pack_by_load({load, ranks.data(), 6, 2, 3});
  CHECK((ranks == std::vector<std::int32_t>{0, 1, 1, 0, 1, 0}));
}

TEST(swaps_lower_the_heaviest_rank_and_keep_sizes) {
  const double load[] = {5, 5, 1, 1};
  std::vector<std::int32_t> ranks{0, 0, 1, 1};
  refine_by_swaps({load, ranks.data(), 4, 2, 0}, 100);
  double rows[2] = {0, 0};
  for (int e = 0; e < 4; ++e) rows[ranks[e]] += load[e];
  CHECK_EQUAL(rows[0], 6.0);
  CHECK_EQUAL(rows[1], 6.0);
  std::vector<std::int32_t> stays{0, 0, 1, 1};
  refine_by_swaps({load, stays.data(), 4, 2, 0}, 0);
  CHECK((stays == std::vector<std::int32_t>{0, 0, 1, 1}));
}
