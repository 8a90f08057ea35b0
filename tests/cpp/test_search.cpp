#include "harness.h"
#include "instance.h"

#include <algorithm>
#include <numeric>
#include <set>

using namespace moetuner;

namespace {

struct Found {
  std::vector<std::int32_t> places;
  std::vector<double> cost;

  double total() const { return std::accumulate(cost.begin(), cost.end(), 0.0); }
};

using Search = void (*)(const SearchProblem&, const SearchOptions&, const SearchState&);

Found run(Search search,
          const SearchProblem& problem,
          const SearchOptions& options,
          std::vector<std::int32_t> start,
          std::int32_t stop = 0) {
  Found found{std::move(start), std::vector<double>(static_cast<std::size_t>(problem.num_layers))};
  const auto num_slots = static_cast<std::int64_t>(found.places.size()) / problem.num_layers;
  search(problem, options, {found.places.data(), num_slots, found.cost.data(), &stop});
  return found;
}

Instance drawn(std::uint64_t seed, std::int64_t ranks_per_node) {
  Instance instance;
  instance.seed = seed;
  instance.ranks_per_node = ranks_per_node;
  instance.draw();
  return instance;
}

void check_legal(const Instance& instance, const std::vector<std::int32_t>& slots) {
  const auto num_slots = static_cast<std::int64_t>(slots.size()) / instance.num_layers;
  const std::int64_t per_rank = num_slots / instance.num_ranks;
  for (std::int64_t l = 0; l < instance.num_layers; ++l) {
    std::set<std::int32_t> placed;
    for (std::int64_t rank = 0; rank < instance.num_ranks; ++rank) {
      std::set<std::int32_t> here;
      for (std::int64_t i = 0; i < per_rank; ++i) {
        const std::int32_t expert = slots[l * num_slots + rank * per_rank + i];
        if (expert < 0) continue;
        CHECK(here.insert(expert).second);
        placed.insert(expert);
      }
    }
    CHECK_EQUAL(static_cast<std::int64_t>(placed.size()), instance.num_experts);
  }
}

}  // namespace

TEST(what_layers_cost_is_the_price_of_the_tally) {
  for (const WireRules wire : kAllRules) {
    for (const std::int64_t per_node : {1, 2, 4}) {
      for (const std::int64_t spare : {0, 1}) {
        Instance instance = drawn(3 + spare, per_node);
        instance.uneven = spare == 1;
        const auto problem = instance.problem(wire, Homes::kUniform, false);
        const auto start = instance.dealt(spare);
        const auto before = run(&search_layers, problem, short_search(0, 1, 1), start);
        const auto after = run(&search_layers, problem, short_search(300, 1, 2), start);
        for (const auto* found : {&before, &after}) {
          const auto slots = instance.slots_of(found->places);
          const auto priced = instance.priced(slots, wire, Homes::kUniform);
          for (std::size_t l = 0; l < priced.size(); ++l) CHECK_NEAR(found->cost[l], priced[l]);
        }
        for (std::size_t l = 0; l < after.cost.size(); ++l) CHECK(after.cost[l] <= before.cost[l]);
      }
    }
  }
}

TEST(what_walks_cost_is_the_price_of_the_tally) {
  for (const WireRules wire : kAllRules) {
    for (const std::int64_t per_node : {1, 2, 4}) {
      for (const bool replicas : {false, true}) {
        Instance instance = drawn(5, per_node);
        instance.uneven = replicas;
        auto problem = instance.problem(wire, Homes::kRecorded, true);
        problem.replicas = replicas;
        const auto start = instance.slots_of(instance.dealt(replicas));
        for (const std::int64_t proposals : {0, 200}) {
          const auto found = run(&search_tokens, problem, short_search(proposals, 2, 2), start);
          check_legal(instance, found.places);
          const auto priced = instance.priced(found.places, wire, Homes::kRecorded);
          for (std::size_t l = 0; l < priced.size(); ++l) CHECK_NEAR(found.cost[l], priced[l]);
        }
      }
    }
  }
}

TEST(walks_choose_replicas_as_the_tally_does_by_every_rule) {
  for (const ReplicaRule rule : kAll<ReplicaRule>) {
    for (const std::int64_t per_node : {1, 2, 4}) {
      const Instance instance = drawn(6, per_node);
      auto problem = instance.problem(rules_of(Wire::kDedup), Homes::kRecorded, true);
      problem.replicas = true;
      problem.replica_rule = rule;
      const auto start = instance.slots_of(instance.dealt(1));
      const auto found = run(&search_tokens, problem, short_search(200, 2, 2), start);
      const auto walked = run(&search_tokens, problem, short_search(0, 1, 1), found.places);
      check_legal(instance, found.places);
      const auto priced =
          instance.priced(found.places, rules_of(Wire::kDedup), Homes::kRecorded, rule);
      for (std::size_t l = 0; l < priced.size(); ++l) {
        CHECK_NEAR(found.cost[l], priced[l]);
        CHECK_NEAR(walked.cost[l], priced[l]);
      }
    }
  }
}

TEST(threads_change_nothing) {
  for (const Homes homes : kAll<Homes>) {
    const Instance instance = drawn(9, 2);
    auto problem = instance.problem(rules_of(Wire::kDedup), homes, homes != Homes::kUniform);
    problem.smoothing = {0.5, 0.5, 0.1, 0.2, 0.2};
    const auto start = instance.dealt(1);
    const auto one = run(&search_layers, problem, short_search(400, 4, 1), start);
    const auto four = run(&search_layers, problem, short_search(400, 4, 4), start);
    CHECK(one.places == four.places);
    CHECK(one.cost == four.cost);
    problem = instance.problem(rules_of(Wire::kDedup), homes, true);
    problem.replicas = true;
    const auto slots = instance.slots_of(start);
    const auto walked = run(&search_tokens, problem, short_search(200, 4, 1), slots);
    CHECK(walked.places == run(&search_tokens, problem, short_search(200, 4, 4), slots).places);
  }
}

TEST(layers_that_are_searched_together_cost_less) {
  Instance instance = drawn(11, 2);
  for (const Search search : {&search_layers, &search_tokens}) {
    const auto problem = instance.problem(rules_of(Wire::kDedup), Homes::kFollow, true);
    auto start = instance.dealt(0);
    if (search == &search_tokens) start = instance.slots_of(start);
    const auto before = run(search, problem, short_search(0, 1, 2), start);
    const auto after = run(search, problem, short_search(4000, 8, 2), start);
    CHECK(after.total() < 0.95 * before.total());
  }
}

TEST(a_search_that_is_stopped_leaves_a_placement) {
  const Instance instance = drawn(13, 2);
  const auto problem = instance.problem(rules_of(Wire::kDedup), Homes::kUniform, false);
  const auto start = instance.dealt(0);
  const auto stopped = run(&search_layers, problem, short_search(1'000'000, 1, 2), start, 1);
  CHECK(stopped.places == start);
  const auto problem2 = instance.problem(rules_of(Wire::kDedup), Homes::kRecorded, true);
  const auto slots = instance.slots_of(start);
  CHECK(run(&search_tokens, problem2, short_search(1'000'000, 1, 2), slots, 1).places == slots);
}

TEST(moves_have_their_price) {
  const Instance instance = drawn(15, 2);
  auto problem = instance.problem(rules_of(Wire::kDedup), Homes::kUniform, false);
  const auto stay = instance.dealt(0);
  problem.stay_rank = stay.data();
  problem.move_seconds = 1e9;
  const auto found = run(&search_layers, problem, short_search(500, 1, 2), stay);
  CHECK(found.places == stay);
  problem.move_seconds = 0.0;
  CHECK(run(&search_layers, problem, short_search(500, 1, 2), stay).places != stay);
}

TEST(one_rank_has_nothing_to_search) {
  Instance instance;
  instance.num_ranks = instance.ranks_per_node = 1;
  instance.rank_speeds = {1.0};
  instance.draw();
  const auto problem = instance.problem(rules_of(Wire::kDedup), Homes::kUniform, false);
  const auto found = run(&search_layers, problem, short_search(10, 1, 1), instance.dealt(0));
  CHECK(found.places == instance.dealt(0));
  CHECK(found.total() > 0);
}
