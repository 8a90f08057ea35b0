#include "token_sets.h"

#include "clones.h"

#include <algorithm>
#include <bit>

namespace moetuner {
namespace {

using Word = TokenSets::Word;

MOETUNER_CLONES
void count_after_swap(const Word* once,
                      const Word* twice,
                      const Word* out,
                      const Word* in,
                      const std::vector<std::int64_t>& begin,
                      std::int32_t* hits) {
  for (std::size_t s = 0; s + 1 < begin.size(); ++s) {
    std::int64_t count = 0;
    for (std::int64_t w = begin[s]; w < begin[s + 1]; ++w) {
      count += std::popcount((once[w] & (twice[w] | ~out[w])) | in[w]);
    }
    hits[s] = static_cast<std::int32_t>(count);
  }
}

MOETUNER_CLONES
void count_bits(const Word* words, const std::vector<std::int64_t>& begin, std::int32_t* hits) {
  for (std::size_t s = 0; s + 1 < begin.size(); ++s) {
    std::int64_t count = 0;
    for (std::int64_t w = begin[s]; w < begin[s + 1]; ++w) count += std::popcount(words[w]);
    hits[s] = static_cast<std::int32_t>(count);
  }
}

MOETUNER_CLONES
void add_member(Word* once, Word* twice, const Word* member, std::int64_t count) {
  for (std::int64_t w = 0; w < count; ++w) {
    twice[w] |= once[w] & member[w];
    once[w] |= member[w];
  }
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

void TokenSets::hits_after_swap(const Place& place,
                                std::int64_t out,
                                std::int64_t in,
                                std::int32_t* hits) const {
  count_after_swap(place.once.data(), place.twice.data(), row(out), row(in), begin_, hits);
}

void TokenSets::hits(const Place& place, std::int32_t* hits) const {
  count_bits(place.once.data(), begin_, hits);
}

}  // namespace moetuner
