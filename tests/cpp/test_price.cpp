#include "harness.h"
#include "moetuner/planning/price.h"

#include <algorithm>

using namespace moetuner;

namespace {

const LinkRates kDispatch{1.0, 4.0, 0.25, 0.5};
const LinkRates kCombine{2.0, 8.0, 0.25, 0.5};

Rates rates() {
  return {{2.0, 5.0}, kDispatch, kCombine, {3.0, 12.0, 0.5, 1.0}, 1.0 / 3, {1, 0.5}};
}

}  // namespace

TEST(a_rank_is_bound_by_rows_or_by_experts) {
  const LayerPrice price(rates());
  CHECK_EQUAL(price.compute(0, 0, 0), 0.0);
  CHECK_EQUAL(price.compute(0, 1, 1), 5.0);
  CHECK_EQUAL(price.compute(0, 3, 1), 6.0);
  CHECK_EQUAL(price.compute(1, 3, 1), 12.0);  // half as fast
}

TEST(the_slowest_rank_counts) {
  const LayerPrice price(rates());
  const double rows[] = {3, 1, 0, 4};
  const double active[] = {1, 1, 0, 1};
  double seconds[2];
  price.slowest_rank(rows, active, 2, seconds);
  CHECK_EQUAL(seconds[0], 10.0);
  CHECK_EQUAL(seconds[1], 16.0);
}

TEST(rates_of_a_rank_are_its_price) {
  const LayerPrice price(rates());
  for (const double rows : {0.0, 1.0, 7.0}) {
    for (const double active : {0.0, 1.0, 3.0}) {
      CHECK_NEAR(busy_seconds(price.on_rank(1), rows, active), price.compute(1, rows, active));
    }
  }
}

TEST(planes_are_the_price_where_they_are_highest) {
  Rates compute = rates();
  compute.planes = {{1.5, 1.0}, {0.5, 4.75}};
  for (const double rows : {0.0, 1.0, 7.0}) {
    for (const double active : {0.0, 1.0, 3.0}) {
      double highest = 0.0;
      for (const ComputeRates& plane : busy_planes(compute.compute, compute.planes)) {
        highest = std::max(highest, rows * plane.row + active * plane.expert);
      }
      CHECK_EQUAL(highest, busy_seconds(compute, rows, active));
    }
  }
}

TEST(a_rank_computes_in_its_own_way) {
  Rates mixed = rates();
  mixed.planes = {{1.5, 1.0}};
  mixed.rank_compute = {{mixed.compute, mixed.planes}, {{3.0, 1.0}, {}, 0.25}};
  const LayerPrice price(mixed);
  CHECK_EQUAL(price.compute(0, 3, 1), 6.0);
  CHECK_EQUAL(price.compute(0, 3, 3), 15.0);
  CHECK_EQUAL(price.compute(1, 3, 1), 18.25);  // by its own rates, at half the speed
  CHECK_EQUAL(price.compute(1, 0, 2), 4.25);
  CHECK_EQUAL(price.compute(1, 0, 0), 0.0);
  CHECK_EQUAL(price.on_rank(1).row, 6.0);
  CHECK_EQUAL(mixed.of_nodes({1.0}).rank_compute.size(), std::size_t{0});
}

TEST(the_slower_link_and_the_longer_latency_count) {
  CHECK_EQUAL(LayerPrice::exchange(kDispatch, 0, 0), 0.0);
  CHECK_EQUAL(LayerPrice::exchange(kDispatch, 2, 0), 2.25);
  CHECK_EQUAL(LayerPrice::exchange(kDispatch, 0, 2), 8.5);
  CHECK_EQUAL(LayerPrice::exchange(kDispatch, 9, 2), 9.5);
  CHECK_EQUAL(LayerPrice::exchange(kCombine, 9, 2), 18.5);
}

TEST(hops_in_turn_count_both) {
  LinkRates in_turn = kDispatch;
  in_turn.hops = Hops::kInTurn;
  CHECK_EQUAL(LayerPrice::exchange(in_turn, 9, 2), 17.5);
  for (const double rows : {0.0, 0.1, 7.3}) {  // on one level nothing changes
    CHECK_EQUAL(LayerPrice::exchange(in_turn, rows, 0), LayerPrice::exchange(kDispatch, rows, 0));
  }
}

TEST(nodes_compute_together_and_move_nothing_inside) {
  const Rates nodes = rates().of_nodes({0.75});
  CHECK_EQUAL(nodes.compute.row, 1.0);
  CHECK_EQUAL(nodes.compute.expert, 2.5);
  CHECK_EQUAL(nodes.dispatch.rank_row, 0.0);
  CHECK_EQUAL(nodes.combine.rank_latency, 0.0);
  CHECK_EQUAL(nodes.both_ways.node_row, 12.0);
  CHECK_EQUAL(nodes.rank_speeds.size(), std::size_t{1});
}
