#pragma once

#include "moetuner/planning/replica_rule.h"

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace moetuner {

/// Tokens in the batches that ranks see: row by row, in the order of their indices.
///
/// With homes, a batch is shared out by them. Without, it is dealt out, one token to each rank in
/// turn. Empty where no rule asks for rows.
class SourceRows {
 public:
  struct Batches {
    std::int64_t num_tokens;
    const std::int32_t* batch;  // [T], in [0, num_batches)
    std::int64_t num_batches;
    std::int64_t num_ranks;
  };

  SourceRows() = default;

  /// `home` [T], null for tokens that are dealt out.
  template <typename Home>
  SourceRows(const Batches& batches, const Home* home);

  std::int64_t row(std::int64_t token) const { return row_[token]; }

  /// Begin of each rank's batch in `order`, [B * G + 1].
  const std::vector<std::int64_t>& begin() const { return begin_; }
  /// Tokens, rank's batch by rank's batch, [T].
  const std::vector<std::int64_t>& order() const { return order_; }

 private:
  std::vector<std::int64_t> row_;    // [T]
  std::vector<std::int64_t> begin_;  // [B * G + 1]
  std::vector<std::int64_t> order_;  // [T]
};

template <typename Home>
SourceRows::SourceRows(const Batches& batches, const Home* home)
    : row_(static_cast<std::size_t>(batches.num_tokens)),
      begin_(static_cast<std::size_t>(batches.num_batches * batches.num_ranks) + 1, 0),
      order_(static_cast<std::size_t>(batches.num_tokens)) {
  std::vector<std::int64_t> placed(static_cast<std::size_t>(batches.num_batches), 0);
  std::vector<std::int64_t> source(row_.size());
  for (std::int64_t t = 0; t < batches.num_tokens; ++t) {
    const std::int64_t batch = batches.batch[t];
    const std::int64_t rank = home != nullptr ? home[t] : placed[batch]++ % batches.num_ranks;
    source[t] = batch * batches.num_ranks + rank;
    row_[t] = begin_[source[t] + 1]++;
  }
  for (std::size_t s = 1; s < begin_.size(); ++s) begin_[s] += begin_[s - 1];
  for (std::int64_t t = 0; t < batches.num_tokens; ++t) order_[begin_[source[t]] + row_[t]] = t;
}

/// The choices of one layer.
struct LayerChoices {
  const std::int16_t* topk_ids;  // [T, L, K], other ids than experts are padding
  std::int64_t num_tokens;
  std::int64_t num_layers;
  std::int64_t top_k;
  std::int64_t num_experts;
  std::int64_t layer;
  const std::int64_t* token;  // [T], index of each token in its trace; null: as they come
};

/// What a rule counts by, for every choice of a layer: `pick_slot` takes the rest of a division.
class ReplicaNumbers {
 public:
  ReplicaNumbers(ReplicaRule rule, const LayerChoices& choices, const SourceRows& rows);

  /// For choice `k` of a token, which is `expert`.
  std::int64_t of(std::int64_t token, std::int64_t k, std::int64_t expert) const {
    switch (rule_) {
      case ReplicaRule::kMoetuner:
        return index_of(token);
      case ReplicaRule::kVllm:
        return static_cast<std::uint32_t>(rows_->row(token)) * std::uint32_t{2654435769};
      case ReplicaRule::kSglangDynamic:
        return drawn(index_of(token), layer_, expert);
      case ReplicaRule::kSglangStatic:
      case ReplicaRule::kVllmAscend:
        return 0;
      case ReplicaRule::kTensorrtLlm:
        return turns_[token * top_k_ + k];
    }
    throw std::invalid_argument("ReplicaNumbers: no such rule");
  }

 private:
  std::int64_t index_of(std::int64_t token) const {
    return token_ != nullptr ? token_[token] : token;
  }
  /// One draw for every (token, layer, expert), the same on every run.
  static std::int64_t drawn(std::int64_t token, std::int64_t layer, std::int64_t expert);
  void count_turns(const LayerChoices& choices);

  ReplicaRule rule_;
  const SourceRows* rows_;
  const std::int64_t* token_;
  std::int64_t layer_;
  std::int64_t top_k_;
  std::vector<std::uint32_t> turns_;  // [T, K], kTensorrtLlm
};

}  // namespace moetuner
