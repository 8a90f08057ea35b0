#include "planning/tally/replica_numbers.h"

namespace moetuner {
namespace {

constexpr std::int64_t kTurnBlock = 1024;  // choices that TensorRT-LLM counts by themselves

/// SplitMix64: any 64 bits from any others.
std::uint64_t mixed(std::uint64_t bits) {
  bits += 0x9e3779b97f4a7c15;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111eb;
  return bits ^ (bits >> 31);
}

}  // namespace

std::vector<std::int32_t> deal_out(const Batches& batches) {
  std::vector<std::int64_t> dealt(static_cast<std::size_t>(batches.num_batches), 0);
  std::vector<std::int32_t> home(static_cast<std::size_t>(batches.num_tokens));
  for (std::int64_t t = 0; t < batches.num_tokens; ++t) {
    home[t] = static_cast<std::int32_t>(dealt[batches.batch[t]]++ % batches.num_ranks);
  }
  return home;
}

SourceRows::SourceRows(const Batches& batches, const std::int32_t* home)
    : row_(static_cast<std::size_t>(batches.num_tokens)),
      begin_(static_cast<std::size_t>(batches.num_batches * batches.num_ranks) + 1, 0),
      order_(static_cast<std::size_t>(batches.num_tokens)) {
  const auto source = [&](std::int64_t t) {
    return batches.batch[t] * batches.num_ranks + home[t];
  };
  for (std::int64_t t = 0; t < batches.num_tokens; ++t) row_[t] = begin_[source(t) + 1]++;
  for (std::size_t s = 1; s < begin_.size(); ++s) begin_[s] += begin_[s - 1];
  for (std::int64_t t = 0; t < batches.num_tokens; ++t) order_[begin_[source(t)] + row_[t]] = t;
}

ReplicaNumbers::ReplicaNumbers(ReplicaRule rule,
                               const LayerChoices& choices,
                               const SourceRows& rows)
    : rule_(rule),
      rows_(&rows),
      token_(choices.token),
      layer_(choices.layer),
      top_k_(choices.top_k) {
  if (rule == ReplicaRule::kTensorrtLlm) count_turns(choices);
}

std::int64_t ReplicaNumbers::drawn(std::int64_t token, std::int64_t layer, std::int64_t expert) {
  const auto choice = static_cast<std::uint64_t>(layer << 32 | expert);
  return static_cast<std::int64_t>(mixed(mixed(static_cast<std::uint64_t>(token)) ^ choice) >> 1);
}

/// Earlier choices of the same expert in the same block of a rank's batch, and the block's number.
void ReplicaNumbers::count_turns(const LayerChoices& choices) {
  turns_.assign(static_cast<std::size_t>(choices.num_tokens * top_k_), 0);
  std::vector<std::uint32_t> earlier(static_cast<std::size_t>(choices.num_experts));
  std::vector<std::int64_t> seen(earlier.size(), -1);  // block of the last choice
  const auto& begin = rows_->begin();
  std::int64_t block = -1;  // over all batches, so that no two have one number
  for (std::size_t source = 0; source + 1 < begin.size(); ++source) {
    std::int64_t last = -1;
    for (std::int64_t i = begin[source]; i < begin[source + 1]; ++i) {
      const std::int64_t token = rows_->order()[i];
      const std::int16_t* ids = choices.topk_ids + (token * choices.num_layers + layer_) * top_k_;
      for (std::int64_t k = 0; k < top_k_; ++k) {
        const std::int64_t inside = ((i - begin[source]) * top_k_ + k) / kTurnBlock;
        if (inside != last) ++block;
        last = inside;
        const std::int16_t id = ids[k];
        if (id < 0 || id >= choices.num_experts) continue;
        if (seen[id] != block) earlier[id] = 0;
        seen[id] = block;
        turns_[token * top_k_ + k] = earlier[id]++ + static_cast<std::uint32_t>(inside);
      }
    }
  }
}

}  // namespace moetuner
