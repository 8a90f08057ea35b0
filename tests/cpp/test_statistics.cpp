#include "harness.h"
#include "moetuner/planning/statistics.h"

#include <vector>

using namespace moetuner;

TEST(loads_pairs_and_steps_by_hand) {
  // Two tokens, two layers, two experts each; -1 and 9 are padding.
  const std::int16_t ids[] = {0, 1, 1, -1, 1, 2, 9, 2};
  std::vector<std::int64_t> load(6), pairs(18), steps(9);
  for (const int threads : {1, 2}) {
    count_statistics({.topk_ids = ids,
                      .load = load.data(),
                      .coactivation = pairs.data(),
                      .transitions = steps.data(),
                      .num_tokens = 2,
                      .num_layers = 2,
                      .top_k = 2,
                      .num_experts = 3,
                      .num_threads = threads});
    CHECK((load == std::vector<std::int64_t>{1, 2, 1, 0, 1, 1}));
    CHECK_EQUAL(pairs[0 * 3 + 1], 1);  // experts 0 and 1 at the first layer
    CHECK_EQUAL(pairs[1 * 3 + 1], 2);  // the diagonal is the load
    CHECK_EQUAL(pairs[9 + 1 * 3 + 2], 0);
    CHECK((steps == std::vector<std::int64_t>{0, 1, 0, 0, 1, 1, 0, 0, 1}));
  }
}
