#pragma once

#include <cstdint>
#include <vector>

namespace moetuner {

/// Which tokens chose an expert of a place (a rank or node), as bit sets over the tokens.
///
/// Tokens of a scenario begin at a word of their own, so that counts by scenario are counts of
/// words. For a place two sets are kept, "at least one" and "at least two" of its experts; with
/// them the effect of taking out one expert and putting in another costs one pass.
class TokenSets {
 public:
  using Word = std::uint64_t;

  /// `num_words[s]` words for scenario s.
  TokenSets(std::int64_t num_experts, const std::vector<std::int64_t>& num_words);

  std::int64_t num_scenarios() const { return static_cast<std::int64_t>(begin_.size()) - 1; }
  std::int64_t num_words() const { return begin_.back(); }

  /// Marks that bit `index` of scenario s chose the expert.
  void choose(std::int64_t expert, std::int64_t scenario, std::int64_t index);

  /// Sets of a place that holds `members`; ids >= num_experts hold no token.
  struct Place {
    std::vector<Word> once;
    std::vector<Word> twice;
  };

  void fill(Place& place, const std::vector<std::int32_t>& members) const;

  /// Rows on the links of a place: `per_token` for each of its tokens, `per_kept` less for each of
  /// them that is in `kept` (null: none).
  struct Rows {
    std::int32_t per_token = 1;
    std::int32_t per_kept = 0;
    const Word* kept = nullptr;
  };

  /// Rows of each scenario at the place, when `out` leaves and `in` comes.
  void rows_after_swap(const Place& place,
                       std::int64_t out,
                       std::int64_t in,
                       const Rows& rows,
                       std::int32_t* found) const;

  /// Rows of each scenario at the place as it is.
  void rows(const Place& place, const Rows& rows, std::int32_t* found) const {
    rows_after_swap(place, num_experts_, num_experts_, rows, found);
  }

  /// Tokens that chose the expert.
  const Word* row(std::int64_t expert) const {
    return bits_.data() + (expert < num_experts_ ? expert : num_experts_) * num_words();
  }

 private:
  std::int64_t num_experts_;
  std::vector<std::int64_t> begin_;  // [S + 1], first word of each scenario
  std::vector<Word> bits_;           // [E + 1, words]; the last row is empty
};

}  // namespace moetuner
