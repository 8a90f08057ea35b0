#include "harness.h"
#include "instance.h"
#include "planning/tally/link_counts.h"
#include "planning/tally/replicas.h"
#include "planning/tally/token_sets.h"

#include <array>
#include <atomic>

using namespace moetuner;

TEST(replicas_are_picked_on_the_rank_then_on_the_node_then_in_turn) {
  // Two slots a rank, two ranks a node: expert 0 on ranks 0 and 1, expert 1 on rank 2 alone.
  const std::array<std::int32_t, 8> experts{0, -1, 0, 2, 1, 3, 0, -1};
  const Replicas replicas({experts.data(), 8, 4, 4, 2, ReplicaRule::kMoetuner, nullptr});
  CHECK(replicas.any());
  CHECK_EQUAL(replicas.count(0), 3);
  CHECK_EQUAL(replicas.pick(0, 0, 5), 0);  // on the home
  CHECK_EQUAL(replicas.pick(0, 3, 5), 6);
  CHECK_EQUAL(replicas.pick(0, 2, 5), 6);  // on the home's node
  CHECK_EQUAL(replicas.pick(1, 0, 5), 4);  // the only one
  for (const std::int64_t token : {0, 1, 2, 3}) {
    CHECK(replicas.pick(2, 2, token) == 3);
  }
}

TEST(an_expert_with_one_slot_is_found_there_from_everywhere) {
  // Two slots a rank, two ranks a node; expert 0 is on three ranks, expert 1 on one, 2 nowhere.
  const std::array<std::int32_t, 8> experts{0, -1, 0, -1, 1, -1, 0, -1};
  for (const ReplicaRule rule : kAll<ReplicaRule>) {
    const Replicas replicas({experts.data(), 8, 3, 4, 2, rule, nullptr});
    CHECK_EQUAL(replicas.lone(0), -1);
    CHECK_EQUAL(replicas.lone(1), 4);
    CHECK_EQUAL(replicas.lone(2), -1);
    CHECK_EQUAL(replicas.in_turn(0, 4), 2);
    CHECK_EQUAL(replicas.rank_of(6), 3);
  }
}

TEST(links_of_a_token_by_hand) {
  // Home 0; experts on ranks 1, 2 and 3 of two nodes with two ranks.
  const std::int32_t ranks[] = {1, 2, 3};
  const auto links_of = [&](Wire wire) {
    LinkCounts links(1, 4, 2, rules_of(wire));
    links.add(0, 0, ranks, 3, 1);
    return std::array<double, 3>{links.busiest_rank(0, {}, false),
                                 links.busiest_node(0, {}, false),
                                 static_cast<double>(links.remote_ranks(0))};
  };
  CHECK((links_of(Wire::kDedup) == std::array<double, 3>{1, 1, 3}));
  CHECK((links_of(Wire::kPerExpert) == std::array<double, 3>{1, 2, 3}));
  CHECK(
      (links_of(Wire::kAllGather) == std::array<double, 3>{0, 0, 0}));  // no placement changes them
}

TEST(links_that_differ_count_by_their_time_each_way) {
  // Two rows leave rank 0, for ranks 1 and 2.
  const std::int32_t ranks[] = {1, 2};
  LinkCounts links(1, 4, 4, rules_of(Wire::kDedup));
  links.add(0, 0, ranks, 2, 1);
  const LinkFactors factors{{0.2, 1, 1, 1}, {1, 0.3, 0.5, 1}};
  CHECK_EQUAL(links.busiest_rank(0, factors, false), 0.5);  // into rank 2
  CHECK_EQUAL(links.busiest_rank(0, factors, true), 2.0);   // back into rank 0
}

TEST(a_token_that_goes_leaves_no_row_behind) {
  const std::int32_t ranks[] = {3, 1};
  LinkCounts links(2, 4, 2, rules_of(Wire::kDedup));
  links.add(1, 2, ranks, 2, 1);
  CHECK(links.busiest_rank(1, {}, false) > 0);
  links.add(1, 2, ranks, 2, -1);
  CHECK_EQUAL(links.busiest_rank(1, {}, false), 0.0);
  CHECK_EQUAL(links.busiest_node(1, {}, false), 0.0);
  CHECK_EQUAL(links.remote_nodes(1), 0);
}

TEST(sets_count_the_tokens_of_a_place_after_a_swap) {
  TokenSets sets(3, {2, 1});  // 128 tokens of scenario 0, 64 of scenario 1
  for (const std::int64_t t : {0, 63, 64, 127}) sets.choose(0, 0, t);
  for (const std::int64_t t : {64, 70}) sets.choose(1, 0, t);
  sets.choose(2, 1, 5);
  TokenSets::Place place;
  sets.fill(place, {0, 1});
  std::int32_t found[2];
  sets.rows(place, {}, found);
  CHECK_EQUAL(found[0], 5);  // token 64 chose both
  CHECK_EQUAL(found[1], 0);
  sets.rows_after_swap(place, 0, 2, {}, found);
  CHECK_EQUAL(found[0], 2);
  CHECK_EQUAL(found[1], 1);
  sets.rows(place, {.per_token = 64, .per_kept = 60, .kept = sets.row(1)}, found);
  CHECK_EQUAL(found[0], 5 * 64 - 2 * 60);
}

TEST(an_expert_without_a_slot_is_refused) {
  Instance instance;
  instance.draw();
  std::vector<std::int32_t> slots = instance.slots_of(instance.dealt(0));
  slots[0] = -1;
  CHECK_THROWS(instance.priced(slots, rules_of(Wire::kDedup), Homes::kUniform),
               std::invalid_argument);
}

TEST(recorded_homes_average_to_uniform_ones_where_tokens_are_many) {
  Instance instance;
  instance.num_tokens = 20'000;
  instance.num_layers = 1;
  instance.draw();
  const auto slots = instance.slots_of(instance.dealt(0));
  for (const WireRules wire : kAllRules) {
    const double uniform = instance.priced(slots, wire, Homes::kUniform)[0];
    const double recorded = instance.priced(slots, wire, Homes::kRecorded)[0];
    CHECK(harness::near(recorded, uniform, 0.03));
  }
}

TEST(what_is_asked_before_a_piece_can_end_the_count) {
  const std::array<std::int16_t, 6> ids{0, 1, 1, 0, 0, 1};  // six layers of one token
  const std::array<std::int32_t, 12> slots{0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1};
  const std::array<std::int32_t, 1> group{0};
  for (const int threads : {1, 3}) {
    std::atomic<int> asked{0};
    TallyArgs args{};  // no outputs: nothing is counted
    args.topk_ids = ids.data();
    args.slot_experts = slots.data();
    args.group = group.data();
    args.num_tokens = args.top_k = args.num_groups = 1;
    args.num_layers = 6;
    args.num_experts = args.num_slots = args.num_ranks = args.ranks_per_node = 2;
    args.wire = rules_of(Wire::kDedup);
    args.num_threads = threads;
    args.between = [&] {
      ++asked;
      throw std::out_of_range("a signal");
    };
    CHECK_THROWS(tally_routing(args), std::out_of_range);
    CHECK(asked.load() >= 1 && asked.load() <= threads);
  }
}
