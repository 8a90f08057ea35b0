#include "planning/tally/token_sets.h"

#include "planning/vectorized.h"

namespace moetuner {
namespace {

using Word = TokenSets::Word;

struct Swap {
  const Word* once;
  const Word* twice;
  const Word* out;
  const Word* in;
};

MOETUNER_INLINE inline Word after(const Swap& swap, std::int64_t w) {
  return (swap.once[w] & (swap.twice[w] | ~swap.out[w])) | swap.in[w];
}

void count_all(const Swap& swap, const std::vector<std::int64_t>& begin, std::int32_t* found) {
  vectorized([&]() MOETUNER_INLINE {
    for (std::size_t s = 0; s + 1 < begin.size(); ++s) {
      std::int64_t count = 0;
      for (std::int64_t w = begin[s]; w < begin[s + 1]; ++w) {
        count += __builtin_popcountll(after(swap, w));
      }
      found[s] = static_cast<std::int32_t>(count);
    }
  });
}

void count_but_kept(const Swap& swap,
                    const TokenSets::Rows& rows,
                    const std::vector<std::int64_t>& begin,
                    std::int32_t* found) {
  vectorized([&]() MOETUNER_INLINE {
    for (std::size_t s = 0; s + 1 < begin.size(); ++s) {
      std::int64_t count = 0;
      std::int64_t kept = 0;
      for (std::int64_t w = begin[s]; w < begin[s + 1]; ++w) {
        const Word tokens = after(swap, w);
        count += __builtin_popcountll(tokens);
        kept += __builtin_popcountll(tokens & rows.kept[w]);
      }
      found[s] = static_cast<std::int32_t>(count) * rows.per_token -
                 static_cast<std::int32_t>(kept) * rows.per_kept;
    }
  });
}

void add_member(Word* once, Word* twice, const Word* member, std::int64_t count) {
  vectorized([&]() MOETUNER_INLINE {
    for (std::int64_t w = 0; w < count; ++w) {
      twice[w] |= once[w] & member[w];
      once[w] |= member[w];
    }
  });
}

}  // namespace

TokenSets::TokenSets(std::int64_t num_experts, const std::vector<std::int64_t>& num_words)
    : num_experts_(num_experts), begin_{0} {
  for (const std::int64_t words : num_words) begin_.push_back(begin_.back() + words);
  bits_.assign(static_cast<std::size_t>((num_experts + 1) * begin_.back()), 0);
}

void TokenSets::choose(std::int64_t expert, std::int64_t scenario, std::int64_t index) {
  bits_[expert * num_words() + begin_[scenario] + index / 64] |= Word{1} << (index % 64);
}

void TokenSets::fill(Place& place, const std::vector<std::int32_t>& members) const {
  place.once.assign(static_cast<std::size_t>(num_words()), 0);
  place.twice.assign(static_cast<std::size_t>(num_words()), 0);
  for (const std::int32_t expert : members) {
    if (expert >= num_experts_) continue;
    add_member(place.once.data(), place.twice.data(), row(expert), num_words());
  }
}

void TokenSets::rows_after_swap(const Place& place,
                                std::int64_t out,
                                std::int64_t in,
                                const Rows& rows,
                                std::int32_t* found) const {
  const Swap swap{place.once.data(), place.twice.data(), row(out), row(in)};
  if (rows.kept == nullptr) return count_all(swap, begin_, found);
  count_but_kept(swap, rows, begin_, found);
}

}  // namespace moetuner
