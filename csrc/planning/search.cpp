#include "moetuner/search.h"

#include "layer_search.h"
#include "moetuner/parallel.h"
#include "random_draws.h"
#include "stop_clock.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace moetuner {
namespace {

constexpr std::int64_t kTrials = 64;       // random swaps that set the temperature
constexpr std::int64_t kClockEvery = 256;  // proposals between looks at the clock
constexpr double kNeighbourShare = 0.6;    // proposals that pair experts of like load

class Anneal {
 public:
  Anneal(const SearchArgs& args, std::int64_t layer)
      : args_(args),
        layer_(layer),
        search_(args, layer),
        random_(seed_of(args.seed, layer)),
        by_load_(static_cast<std::size_t>(args.num_slots)),
        place_(static_cast<std::size_t>(args.num_slots)) {
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
    if (args_.num_ranks > 1) {
      cool(clock);
      search_.place(best_);
      descend(clock);
    }
    std::copy(best_.begin(), best_.end(), args_.rank_of + layer_ * args_.num_slots);
    args_.cost[layer_] = best_cost_;
  }

 private:
  /// A pair on different ranks, at least one of them an expert; false when none was found.
  bool draw_pair(std::int64_t& a, std::int64_t& b) {
    for (int attempt = 0; attempt < 16; ++attempt) {
      a = random_.below(args_.num_slots);
      if (random_.unit() < kNeighbourShare) {
        const std::int64_t step = 1 + random_.below(3);
        const std::int64_t other = place_[a] + (random_.coin() ? step : -step);
        if (other < 0 || other >= args_.num_slots) continue;
        b = by_load_[other];
      } else {
        b = random_.below(args_.num_slots);
      }
      if (search_.ranks()[a] == search_.ranks()[b]) continue;
      if (a < args_.num_experts || b < args_.num_experts) return true;
    }
    return false;
  }

  /// Median |change| of random swaps: the unit of temperature.
  double unit() {
    std::vector<double> changes;
    std::int64_t a = 0;
    std::int64_t b = 0;
    for (std::int64_t i = 0; i < kTrials; ++i) {
      if (!draw_pair(a, b)) continue;
      changes.push_back(std::abs(search_.propose(a, b) - search_.cost()));
      search_.reject();
    }
    if (changes.empty()) return 0.0;
    std::nth_element(changes.begin(), changes.begin() + changes.size() / 2, changes.end());
    return changes[changes.size() / 2];
  }

  void cool(const StopClock& clock) {
    const double base = unit();
    const double ratio = args_.end_temperature / args_.start_temperature;
    double temperature = 0.0;
    std::int64_t a = 0;
    std::int64_t b = 0;
    for (std::int64_t i = 0; i < args_.proposals; ++i) {
      if (i % kClockEvery == 0) {
        if (clock.stopped()) return;
        const double done = static_cast<double>(i) / static_cast<double>(args_.proposals);
        temperature = base * args_.start_temperature * std::pow(ratio, done);
      }
      if (!draw_pair(a, b)) return;
      const double change = search_.propose(a, b) - search_.cost();
      if (change <= 0 || random_.unit() < std::exp(-change / temperature)) {
        search_.accept();
        keep_best();
      } else {
        search_.reject();
      }
    }
  }

  /// Every pair, until none helps.
  void descend(const StopClock& clock) {
    const double least = 1e-12 * search_.cost();
    for (bool better = true; better;) {
      better = false;
      for (std::int64_t a = 0; a < args_.num_experts; ++a) {
        if (clock.stopped()) return;
        for (std::int64_t b = a + 1; b < args_.num_slots; ++b) {
          if (search_.ranks()[a] == search_.ranks()[b]) continue;
          if (search_.propose(a, b) < search_.cost() - least) {
            search_.accept();
            better = true;
          } else {
            search_.reject();
          }
        }
      }
      keep_best();
    }
  }

  void keep_best() {
    if (search_.cost() >= best_cost_) return;
    best_cost_ = search_.cost();
    best_ = search_.ranks();
  }

  const SearchArgs& args_;
  const std::int64_t layer_;
  LayerSearch search_;
  RandomDraws random_;
  std::vector<std::int64_t> by_load_;
  std::vector<std::int64_t> place_;  // of a member in by_load_
  std::vector<std::int32_t> best_;
  double best_cost_ = 0.0;
};

}  // namespace

void search_layers(const SearchArgs& args) {
  const StopClock clock(args.seconds, args.stop);
  parallel_for(args.num_layers, args.num_threads, [&](std::int64_t layer) {
    Anneal(args, layer).run(clock);
  });
}

}  // namespace moetuner
