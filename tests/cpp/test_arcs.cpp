#include "harness.h"
#include "moetuner/planning/arcs.h"

#include <array>

using namespace moetuner;

namespace {

/// Two states of two experts on two ranks; every token of expert f goes to expert f alone.
struct Steps {
  std::array<std::int32_t, 4> rank_of{0, 1, 1, 0};
  std::array<double, 8> rank_rows{5, 0, 0, 3, 0, 5, 3, 0};
  std::array<double, 8> node_rows{5, 0, 0, 3, 0, 5, 3, 0};
  std::array<std::int32_t, 4> rename{0, 1, 1, 0};
  std::array<double, 4> link_seconds{0, 2, 3, 0};
  std::array<double, 1> weight{1.0};
  std::array<double, 4> best{};
  std::array<std::int32_t, 4> renamed{};
  LinkFactors rank_links{};

  void run(ArcCost cost, std::int64_t ranks_per_node, std::int64_t num_renames, int threads) {
    cheapest_arcs({.rank_of = rank_of.data(),
                   .rank_rows = rank_rows.data(),
                   .node_rows = node_rows.data(),
                   .rename = rename.data(),
                   .link_seconds = link_seconds.data(),
                   .weight = weight.data(),
                   .num_batches = 1,
                   .num_states = 2,
                   .num_experts = 2,
                   .num_ranks = 2,
                   .ranks_per_node = ranks_per_node,
                   .num_renames = num_renames,
                   .cost = cost,
                   .crossing = Crossing::kGateway,
                   .dispatch = {1.0, 10.0, 0.25, 0.5},
                   .rank_links = rank_links,
                   .node_links = {},
                   .num_threads = threads,
                   .best = best.data(),
                   .renamed = renamed.data()});
  }
};

}  // namespace

TEST(a_renaming_that_keeps_every_row_home_costs_nothing) {
  for (const int threads : {1, 2}) {
    for (const std::int64_t per_node : {1, 2}) {
      Steps steps;
      steps.run(ArcCost::kExchange, per_node, 2, threads);
      for (const double best : steps.best) CHECK_EQUAL(best, 0.0);
      CHECK((steps.renamed == std::array<std::int32_t, 4>{0, 1, 1, 0}));
    }
  }
}

TEST(without_renaming_the_busiest_link_is_paid) {
  Steps steps;
  steps.run(ArcCost::kExchange, 2, 1, 1);
  CHECK_EQUAL(steps.best[0], 0.0);
  CHECK_EQUAL(steps.best[1], 5.25);  // five rows over a rank's link, and its latency
  steps.run(ArcCost::kExchange, 1, 1, 1);
  CHECK_EQUAL(steps.best[1], 50.5);  // over a node's link
}

TEST(a_way_that_is_faster_counts_for_less) {
  Steps steps;
  steps.rank_links = {{1.0, 1.0}, {0.5, 0.5}};
  steps.run(ArcCost::kExchange, 2, 1, 1);
  CHECK_EQUAL(steps.best[1], 5.25);  // five rows out of rank 0
  steps.rank_links = {{0.1, 0.1}, {0.5, 0.5}};
  steps.run(ArcCost::kExchange, 2, 1, 1);
  CHECK_EQUAL(steps.best[1], 2.75);  // as many into rank 1
}

TEST(other_costs_of_a_step) {
  Steps steps;
  steps.run(ArcCost::kSlowestPair, 2, 1, 1);
  CHECK_EQUAL(steps.best[1], 10.0);  // 5 rows from rank 0 to 1 at 2 s, 3 back at 3 s
  steps.run(ArcCost::kRemote, 2, 1, 1);
  CHECK_EQUAL(steps.best[1], 8.0);
}
