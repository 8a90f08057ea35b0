#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>

namespace moetuner {

/// How much arrives at a rank: N lines, one for each row on the wire, and M rows of experts.
struct Arrived {
  std::int64_t lines, rows;
};

/// What the next dispatch of each layer brings, from what its last one brought: with it the host
/// need not wait for sizes before it enqueues what reads them. A guess that is too small costs
/// time, never rows.
class SizeGuess {
 public:
  /// Some more than last time; none where the layer is new, or sent another number of tokens.
  std::optional<Arrived> next(const void* layer, std::int64_t num_tokens) const {
    const auto found = last_.find(layer);
    if (found == last_.end() || found->second.num_tokens != num_tokens) return {};
    const Arrived& last = found->second.arrived;
    return Arrived{with_margin(last.lines), with_margin(last.rows)};
  }

  void saw(const void* layer, std::int64_t num_tokens, const Arrived& arrived) {
    if (last_.size() >= kMostLayers) last_.clear();
    last_[layer] = {num_tokens, arrived};
  }

 private:
  struct Last {
    std::int64_t num_tokens;
    Arrived arrived;
  };

  static constexpr std::size_t kMostLayers = 1024;

  static std::int64_t with_margin(std::int64_t count) { return count + count / 32 + 64; }

  std::map<const void*, Last> last_;  // by the table that the layer routes by
};

}  // namespace moetuner
