#pragma once

#include "moetuner/planning/parallel.h"
#include "moetuner/planning/search.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <mutex>

namespace moetuner {

/// How many proposals each layer gets, so that all end together, shortly before the time is up.
///
/// What a proposal takes is seen from the layers that are done; until one is, and where the time
/// shall not be filled, each gets what the options say. `Clock` is steady_clock but for tests.
template <typename Clock = std::chrono::steady_clock>
class Pace {
 public:
  Pace(const SearchOptions& options, std::int64_t num_layers)
      : options_(options),
        threads_(resolve_threads(options.num_threads, num_layers)),
        waiting_(num_layers),
        began_(Clock::now()) {}

  /// Proposals of a layer that begins now.
  std::int64_t begin() {
    const std::lock_guard lock(mutex_);
    const std::int64_t running = num_layers_running_++;
    const std::int64_t layers = waiting_--;
    if (!options_.fills_time || done_ == 0) return options_.proposals;
    const double each = spent_ / static_cast<double>(done_);  // seconds of a proposal
    const double left = kSure * options_.seconds - since(began_);
    // Layers that run are about half done.
    const double busy = 0.5 * static_cast<double>(running * options_.proposals) * each;
    const double all = (left * threads_ - busy) / each;
    const auto fair = static_cast<std::int64_t>(std::max(all, 0.0) / static_cast<double>(layers));
    return std::clamp(fair, options_.proposals / kLess, options_.proposals * kMore);
  }

  /// A layer of so many proposals that began then is done.
  void end(std::int64_t proposals, typename Clock::time_point began) {
    const std::lock_guard lock(mutex_);
    --num_layers_running_;
    done_ += proposals;
    spent_ += since(began);
  }

 private:
  static constexpr double kSure = 0.95;  // share of the time that is planned for
  static constexpr std::int64_t kLess = 4;
  static constexpr std::int64_t kMore = 8;

  static double since(typename Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
  }

  const SearchOptions& options_;
  const int threads_;
  std::mutex mutex_;
  std::int64_t waiting_;
  std::int64_t num_layers_running_ = 0;
  std::int64_t done_ = 0;  // proposals of layers that are done
  double spent_ = 0.0;     // seconds of a thread for them
  const typename Clock::time_point began_;
};

}  // namespace moetuner
