#include "moetuner/planning/search.h"
#include "planning/search/annealing.h"
#include "planning/search/token_layer.h"
#include "planning/tally/replica_numbers.h"
#include "planning/tally/replicas.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace moetuner {
namespace {

constexpr std::int64_t kTrials = 32;  // random moves that set the temperature

struct Move {
  std::int64_t p;
  std::int32_t expert_p;
  std::int64_t q;  // -1: p alone changes
  std::int32_t expert_q;
};

/// Annealing of one layer at one temperature.
class LayerAnneal {
 public:
  LayerAnneal(const SearchProblem& problem, TokenLayer& layer, std::uint64_t seed)
      : problem_(problem),
        num_slots_(static_cast<std::int64_t>(layer.slots().size())),
        layer_(layer),
        random_(seed) {}

  /// Median |change| of random moves: the unit of temperature.
  double unit() {
    std::vector<double> changes;
    Move move{};
    for (std::int64_t i = 0; i < kTrials; ++i) {
      if (!draw(move)) continue;
      changes.push_back(propose(move) - layer_.cost());
      layer_.reject();
    }
    return median_change(std::move(changes));
  }

  void run(std::int64_t proposals, double temperature, const StopClock& clock) {
    Move move{};
    for (std::int64_t i = 0; i < proposals && !clock.stopped(); ++i) {
      if (!draw(move)) continue;
      const double change = propose(move) - layer_.cost();
      is_taken(change, temperature, random_) ? layer_.accept() : layer_.reject();
    }
  }

 private:
  double propose(const Move& move) {
    return layer_.propose(move.p, move.expert_p, move.q, move.expert_q);
  }

  /// Two slots change contents, or a slot that can be spared takes a copy of an expert.
  bool draw(Move& move) {
    const std::int64_t per_rank = num_slots_ / problem_.num_ranks;
    const auto& slots = layer_.slots();
    for (int attempt = 0; attempt < 16; ++attempt) {
      const std::int64_t p = random_.below(num_slots_);
      const std::int32_t e = slots[p];
      const bool spare = problem_.replicas && (e < 0 || layer_.copies(e) > 1);
      if (spare && random_.coin()) {
        const auto f = static_cast<std::int32_t>(random_.below(problem_.num_experts));
        if (f == e || layer_.holds(p / per_rank, f)) continue;
        move = {p, f, -1, -1};
        return true;
      }
      const std::int64_t q = random_.below(num_slots_);
      const std::int32_t f = slots[q];
      if (p / per_rank == q / per_rank || e == f) continue;
      if (e >= 0 && layer_.holds(q / per_rank, e)) continue;
      if (f >= 0 && layer_.holds(p / per_rank, f)) continue;
      move = {p, f, q, e};
      return true;
    }
    return false;
  }

  const SearchProblem& problem_;
  const std::int64_t num_slots_;
  TokenLayer& layer_;
  RandomDraws random_;
};

/// Homes [L + 1, T] and ranks of chosen experts [L, T, K] under the current slots.
struct Walk {
  std::vector<std::int32_t> home;
  std::vector<std::int32_t> ranks;
};

/// Rows of the tokens in the scenarios of their first homes, where the rule asks for them.
SourceRows rows_of(const SearchProblem& problem) {
  if (!asks_row(problem.replica_rule)) return {};
  std::vector<std::int32_t> scenario(static_cast<std::size_t>(problem.num_tokens));
  for (std::int64_t s = 0; s < problem.num_scenarios; ++s) {
    std::fill(scenario.begin() + problem.scenario_begin[s],
              scenario.begin() + problem.scenario_begin[s + 1],
              static_cast<std::int32_t>(s));
  }
  return {{scenario.data(), problem.num_tokens, problem.num_scenarios, problem.num_ranks},
          problem.home};
}

void walk_layer(const SearchProblem& problem,
                const SearchState& state,
                std::int64_t layer,
                const SourceRows& rows,
                Walk& walk) {
  const Replicas replicas({.experts = state.places + layer * state.num_slots,
                           .num_slots = state.num_slots,
                           .num_experts = problem.num_experts,
                           .num_ranks = problem.num_ranks,
                           .ranks_per_node = problem.ranks_per_node,
                           .rule = problem.replica_rule,
                           .rank_slots = nullptr});
  const ReplicaNumbers numbers(problem.replica_rule, choices_of(problem, layer), rows);
  const std::int32_t* home = walk.home.data() + layer * problem.num_tokens;
  std::int32_t* end = walk.home.data() + (layer + 1) * problem.num_tokens;
  for (std::int64_t t = 0; t < problem.num_tokens; ++t) {
    const std::int16_t* ids = problem.topk_ids + (t * problem.num_layers + layer) * problem.top_k;
    std::int32_t* ranks = walk.ranks.data() + (layer * problem.num_tokens + t) * problem.top_k;
    for (std::int64_t k = 0; k < problem.top_k; ++k) {
      const bool padding = ids[k] < 0 || ids[k] >= problem.num_experts;
      ranks[k] = padding ? -1
                         : static_cast<std::int32_t>(replicas.rank_of(
                               replicas.pick(ids[k], home[t], numbers.of(t, k, ids[k]))));
    }
    end[t] = problem.follow && ranks[0] >= 0 ? ranks[0] : home[t];
  }
}

}  // namespace

void search_tokens(const SearchProblem& problem,
                   const SearchOptions& options,
                   const SearchState& state) {
  const StopClock clock(options.seconds, state.stop);
  const SourceRows rows = rows_of(problem);
  Walk walk;
  walk.home.assign(static_cast<std::size_t>((problem.num_layers + 1) * problem.num_tokens), 0);
  walk.ranks.assign(
      static_cast<std::size_t>(problem.num_layers * problem.num_tokens * problem.top_k), -1);
  std::copy_n(problem.home, problem.num_tokens, walk.home.begin());
  std::vector<double> unit(static_cast<std::size_t>(problem.num_layers), -1.0);
  take_turns(
      problem.num_layers,
      options,
      problem.follow ? 2 : 1,
      clock,
      [&] {
        for (std::int64_t layer = 0; layer < problem.num_layers; ++layer) {
          walk_layer(problem, state, layer, rows, walk);
        }
      },
      [&](std::int64_t layer, std::int64_t sweep) {
        const bool coupled = problem.follow && layer + 1 < problem.num_layers;
        TokenLayer current(
            problem,
            state,
            layer,
            walk.home.data() + layer * problem.num_tokens,
            coupled ? walk.ranks.data() + (layer + 1) * problem.num_tokens * problem.top_k
                    : nullptr,
            rows);
        LayerAnneal anneal(
            problem, current, seed_of(options.seed, sweep * problem.num_layers + layer));
        if (unit[layer] < 0) unit[layer] = anneal.unit();
        const double temperature = options.sweep_temperature(sweep) * unit[layer];
        anneal.run(options.proposals / options.sweeps, temperature, clock);
        std::copy(
            current.slots().begin(), current.slots().end(), state.places + layer * state.num_slots);
        state.cost[layer] = current.cost();
      });
}

}  // namespace moetuner
