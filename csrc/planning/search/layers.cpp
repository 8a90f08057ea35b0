#include "moetuner/planning/search.h"
#include "planning/search/annealing.h"
#include "planning/search/layer_search.h"
#include "planning/search/pace.h"

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

namespace moetuner {
namespace {

constexpr std::int64_t kTrials = 64;       // random swaps that set the temperature
constexpr std::int64_t kClockEvery = 256;  // proposals between looks at the clock
constexpr double kNeighbourShare = 0.6;    // proposals that pair experts of like load,
constexpr double kFewExperts = 64.0;       // up to so many; the more experts, the fewer

/// Annealing of one layer: pairs that are drawn change places, as luck and temperature allow.
class Anneal {
 public:
  Anneal(const SearchProblem& problem,
         const SearchOptions& options,
         const SearchState& state,
         std::int64_t layer,
         std::uint64_t seed,
         const Surroundings& around = {})
      : problem_(problem),
        options_(options),
        state_(state),
        layer_(layer),
        search_(problem, state, layer, around),
        random_(seed),
        neighbour_share_(kNeighbourShare *
                         std::min(1.0, kFewExperts / static_cast<double>(problem.num_experts))),
        by_load_(static_cast<std::size_t>(state.num_slots)),
        place_(static_cast<std::size_t>(state.num_slots)) {
    std::iota(by_load_.begin(), by_load_.end(), 0);
    std::stable_sort(by_load_.begin(), by_load_.end(), [&](std::int64_t a, std::int64_t b) {
      return search_.load(a) > search_.load(b);
    });
    for (std::size_t i = 0; i < by_load_.size(); ++i) {
      place_[by_load_[i]] = static_cast<std::int64_t>(i);
    }
  }

  void run(const StopClock& clock) {
    best_ = search_.ranks();
    best_cost_ = search_.cost();
    if (problem_.num_ranks > 1) {
      cool(clock);
      search_.place(best_);
      descend(clock);
    }
    std::copy(best_.begin(), best_.end(), state_.places + layer_ * state_.num_slots);
    state_.cost[layer_] = best_cost_;
  }

  /// Goes on at one temperature, in units of `unit()`, from where the layer is to where it gets.
  void step(std::int64_t proposals, double temperature, const StopClock& clock) {
    for (std::int64_t i = 0; i < proposals; ++i) {
      if (i % kClockEvery == 0 && clock.stopped()) break;
      try_pair(temperature);
    }
    const auto& ranks = search_.ranks();
    std::copy(ranks.begin(), ranks.end(), state_.places + layer_ * state_.num_slots);
  }

  /// Median |change| of random swaps: the unit of temperature.
  double unit() {
    std::vector<double> changes;
    std::int64_t a = 0;
    std::int64_t b = 0;
    for (std::int64_t i = 0; i < kTrials; ++i) {
      if (!draw_pair(a, b)) continue;
      changes.push_back(search_.propose(a, b) - search_.cost());
      search_.reject();
    }
    return median_change(std::move(changes));
  }

 private:
  /// A pair on different ranks, at least one of them an expert; false when none was found.
  bool draw_pair(std::int64_t& a, std::int64_t& b) {
    for (int attempt = 0; attempt < 16; ++attempt) {
      a = random_.below(state_.num_slots);
      if (random_.unit() < neighbour_share_) {
        const std::int64_t step = 1 + random_.below(3);
        const std::int64_t other = place_[a] + (random_.coin() ? step : -step);
        if (other < 0 || other >= state_.num_slots) continue;
        b = by_load_[other];
      } else {
        b = random_.below(state_.num_slots);
      }
      if (search_.ranks()[a] == search_.ranks()[b]) continue;
      if (a < problem_.num_experts || b < problem_.num_experts) return true;
    }
    return false;
  }

  void cool(const StopClock& clock) {
    const double base = unit();
    double temperature = 0.0;
    for (std::int64_t i = 0; i < options_.proposals; ++i) {
      if (i % kClockEvery == 0) {
        if (clock.stopped()) return;
        const double done = static_cast<double>(i) / static_cast<double>(options_.proposals);
        temperature = base * options_.temperature(done);
      }
      try_pair(temperature);
      keep_best();
    }
  }

  /// Draws a pair and swaps it if luck and temperature allow.
  void try_pair(double temperature) {
    std::int64_t a = 0;
    std::int64_t b = 0;
    if (!draw_pair(a, b)) return;
    const double change = search_.propose(a, b) - search_.cost();
    is_taken(change, temperature, random_) ? search_.accept() : search_.reject();
  }

  /// Every pair, until none helps or as many were tried as the cooling took.
  void descend(const StopClock& clock) {
    const double least = 1e-12 * search_.cost();
    std::int64_t left = options_.proposals;
    for (bool better = true; better && left > 0;) {
      better = false;
      for (std::int64_t a = 0; a < problem_.num_experts && left > 0; ++a) {
        if (clock.stopped()) break;
        for (std::int64_t b = a + 1; b < state_.num_slots; ++b) {
          if (search_.ranks()[a] == search_.ranks()[b]) continue;
          --left;
          if (search_.propose(a, b) < search_.cost() - least) {
            search_.accept();
            better = true;
          } else {
            search_.reject();
          }
        }
      }
      keep_best();
      if (clock.stopped()) return;
    }
  }

  void keep_best() {
    if (search_.cost() >= best_cost_) return;
    best_cost_ = search_.cost();
    best_ = search_.ranks();
  }

  const SearchProblem& problem_;
  const SearchOptions& options_;
  const SearchState& state_;
  const std::int64_t layer_;
  LayerSearch search_;
  RandomDraws random_;
  double neighbour_share_;
  std::vector<std::int64_t> by_load_;
  std::vector<std::int64_t> place_;  // of a member in by_load_
  std::vector<std::int32_t> best_;
  double best_cost_ = 0.0;
};

/// Homes [L, T] under the ranks as they are.
std::vector<std::int32_t> walk(const SearchProblem& problem, const SearchState& state) {
  const auto tokens = static_cast<std::size_t>(problem.num_tokens);
  std::vector<std::int32_t> homes(static_cast<std::size_t>(problem.num_layers) * tokens);
  std::copy_n(problem.home, problem.num_tokens, homes.begin());
  for (std::int64_t layer = 0; layer + 1 < problem.num_layers; ++layer) {
    const std::int32_t* home = homes.data() + layer * problem.num_tokens;
    const std::int32_t* rank_of = state.places + layer * state.num_slots;
    for (std::int64_t t = 0; t < problem.num_tokens; ++t) {
      const std::int16_t id = problem.topk_ids[(t * problem.num_layers + layer) * problem.top_k];
      const bool moves = id >= 0 && id < problem.num_experts;
      homes[(layer + 1) * problem.num_tokens + t] = moves ? rank_of[id] : home[t];
    }
  }
  return homes;
}

/// Homes that follow couple layers: even ones and odd ones take turns.
void search_chain(const SearchProblem& problem,
                  const SearchOptions& options,
                  const SearchState& state,
                  const StopClock& clock) {
  std::vector<double> unit(static_cast<std::size_t>(problem.num_layers), -1.0);
  std::vector<std::int32_t> homes;
  const auto around = [&](std::int64_t layer) {
    const bool coupled = layer + 1 < problem.num_layers;
    return Surroundings{homes.data() + layer * problem.num_tokens,
                        coupled ? state.places + (layer + 1) * state.num_slots : nullptr};
  };
  take_turns(
      problem.num_layers,
      options,
      2,
      clock,
      [&] { homes = walk(problem, state); },
      [&](std::int64_t layer, std::int64_t sweep) {
        Anneal anneal(problem,
                      options,
                      state,
                      layer,
                      seed_of(options.seed, sweep * problem.num_layers + layer),
                      around(layer));
        if (unit[layer] < 0) unit[layer] = anneal.unit();
        const double temperature = options.sweep_temperature(sweep) * unit[layer];
        anneal.step(options.proposals / options.sweeps, temperature, clock);
      });
  // Layers moved after others had been priced.
  homes = walk(problem, state);
  parallel_for(problem.num_layers, options.num_threads, [&](std::int64_t layer) {
    state.cost[layer] = LayerSearch(problem, state, layer, around(layer)).own_cost();
  });
}

}  // namespace

void search_layers(const SearchProblem& problem,
                   const SearchOptions& options,
                   const SearchState& state) {
  const StopClock clock(options.seconds, state.stop);
  if (problem.home != nullptr && problem.follow) {
    return search_chain(problem, options, state, clock);
  }
  Pace<> pace(options, problem.num_layers);
  parallel_for(problem.num_layers, options.num_threads, [&](std::int64_t layer) {
    const auto began = std::chrono::steady_clock::now();
    SearchOptions own = options;
    own.proposals = pace.begin();
    Anneal(problem, own, state, layer, seed_of(options.seed, layer), {.home = problem.home})
        .run(clock);
    pace.end(own.proposals, began);
  });
}

}  // namespace moetuner
