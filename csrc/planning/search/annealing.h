#pragma once

#include "moetuner/planning/parallel.h"
#include "moetuner/planning/search.h"
#include "planning/search/random_draws.h"
#include "planning/search/stop_clock.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace moetuner {

/// Median |change| of a few random moves, the unit of temperature; 0 of none.
///
/// What is not finite does not count: speeds may be next to nothing.
inline double median_change(std::vector<double> changes) {
  std::erase_if(changes, [](double change) { return !std::isfinite(change); });
  if (changes.empty()) return 0.0;
  for (double& change : changes) change = std::abs(change);
  const auto middle = changes.begin() + static_cast<std::int64_t>(changes.size() / 2);
  std::nth_element(changes.begin(), middle, changes.end());
  return *middle;
}

/// Whether a move that changes the cost by so much is made, as luck and temperature allow.
inline bool is_taken(double change, double temperature, RandomDraws& random) {
  return change <= 0 || (temperature > 0 && random.unit() < std::exp(-change / temperature));
}

/// `sweeps` times, ever cooler: `before()`, then `anneal(layer, sweep)` for every `phases`-th layer
/// side by side, and so on from the next layer until each had its turn.
template <typename Before, typename Layer>
void take_turns(std::int64_t num_layers,
                const SearchOptions& options,
                std::int64_t phases,
                const StopClock& clock,
                const Before& before,
                const Layer& anneal) {
  for (std::int64_t sweep = 0; sweep < options.sweeps && !clock.stopped(); ++sweep) {
    for (std::int64_t phase = 0; phase < phases && !clock.stopped(); ++phase) {
      before();
      const std::int64_t count = (num_layers - phase + phases - 1) / phases;
      parallel_for(
          count, options.num_threads, [&](std::int64_t i) { anneal(phase + i * phases, sweep); });
    }
  }
}

}  // namespace moetuner
