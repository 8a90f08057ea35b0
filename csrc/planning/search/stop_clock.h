#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace moetuner {

/// Says when a search has to end: by time, or because another thread said so.
class StopClock {
 public:
  StopClock(double seconds, const std::int32_t* stop)
      : end_(std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds)),
        stop_(const_cast<std::int32_t*>(stop)) {}

  bool stopped() const {
    return std::atomic_ref(*stop_).load(std::memory_order_relaxed) != 0 ||
           std::chrono::steady_clock::now() > end_;
  }

 private:
  std::chrono::time_point<std::chrono::steady_clock, std::chrono::duration<double>> end_;
  std::int32_t* stop_;
};

}  // namespace moetuner
