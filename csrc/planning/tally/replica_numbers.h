#pragma once

#include "moetuner/planning/replica_rule.h"

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace moetuner {

/// Tokens of batches, each of them in [0, num_batches).
struct Batches {
  const std::int32_t* batch;  // [T]
  std::int64_t num_tokens;
  std::int64_t num_batches;
  std::int64_t num_ranks;
};

/// Batches dealt out, one token to each rank in turn: the rank of every token, [T].
std::vector<std::int32_t> deal_out(const Batches& batches);

/// Tokens in the batches that ranks see: row by row, in the order of their indices.
///
/// Empty where no rule asks for rows.
class SourceRows {
 public:
  SourceRows() = default;

  /// `home` [T] shares batches out.
  SourceRows(const Batches& batches, const std::int32_t* home);

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
