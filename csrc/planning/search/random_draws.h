#pragma once

#include <cstdint>
#include <random>

namespace moetuner {

/// The same numbers on every machine, which the distributions of <random> do not promise.
class RandomDraws {
 public:
  explicit RandomDraws(std::uint64_t seed) : bits_(seed) {}

  /// Uniform in [0, count).
  std::int64_t below(std::int64_t count) {
    return static_cast<std::int64_t>(unit() * static_cast<double>(count));
  }
  /// Uniform in [0, 1).
  double unit() { return static_cast<double>(bits_() >> 11) * 0x1.0p-53; }
  bool coin() { return (bits_() & 1) != 0; }

 private:
  std::mt19937_64 bits_;
};

/// A seed of its own for each part of a search.
inline std::uint64_t seed_of(std::uint64_t seed, std::int64_t part) {
  return seed * 0x9E3779B97F4A7C15ULL + static_cast<std::uint64_t>(part);
}

}  // namespace moetuner
