#include "moetuner/planning/statistics.h"

#include "moetuner/planning/parallel.h"

#include <algorithm>
#include <vector>

namespace moetuner {
namespace {

using Ids = const std::int16_t*;

struct Layer {
  Ids ids;  // first token's row of this layer
  std::int64_t stride;
};

Layer layer_of(const StatisticsArgs& args, std::int64_t layer) {
  return {args.topk_ids + layer * args.top_k, args.num_layers * args.top_k};
}

/// The valid ids of one row, packed to the front of `out`; returns how many there are.
int valid_ids(Ids row, const StatisticsArgs& args, std::int64_t* out) {
  int count = 0;
  for (std::int64_t k = 0; k < args.top_k; ++k) {
    if (row[k] >= 0 && row[k] < args.num_experts) out[count++] = row[k];
  }
  return count;
}

void count_load(const StatisticsArgs& args, std::int64_t layer) {
  std::int64_t* load = args.load + layer * args.num_experts;
  std::fill_n(load, args.num_experts, 0);
  const Layer rows = layer_of(args, layer);
  for (std::int64_t t = 0; t < args.num_tokens; ++t) {
    const Ids row = rows.ids + t * rows.stride;
    for (std::int64_t k = 0; k < args.top_k; ++k) {
      if (row[k] >= 0 && row[k] < args.num_experts) ++load[row[k]];
    }
  }
}

/// Counts each unordered pair once, then mirrors the table.
void count_coactivation(const StatisticsArgs& args, std::int64_t layer, std::int64_t* scratch) {
  const std::int64_t num_experts = args.num_experts;
  std::int64_t* table = args.coactivation + layer * num_experts * num_experts;
  std::fill_n(table, num_experts * num_experts, 0);
  const Layer rows = layer_of(args, layer);
  for (std::int64_t t = 0; t < args.num_tokens; ++t) {
    const int count = valid_ids(rows.ids + t * rows.stride, args, scratch);
    for (int i = 0; i < count; ++i) {
      for (int j = i; j < count; ++j) ++table[scratch[i] * num_experts + scratch[j]];
    }
  }
  for (std::int64_t a = 0; a < num_experts; ++a) {
    for (std::int64_t b = a + 1; b < num_experts; ++b) {
      const std::int64_t both = table[a * num_experts + b] + table[b * num_experts + a];
      table[a * num_experts + b] = table[b * num_experts + a] = both;
    }
  }
}

void count_transitions(const StatisticsArgs& args, std::int64_t layer, std::int64_t* scratch) {
  const std::int64_t num_experts = args.num_experts;
  std::int64_t* table = args.transitions + layer * num_experts * num_experts;
  std::fill_n(table, num_experts * num_experts, 0);
  const Layer here = layer_of(args, layer);
  const Layer next = layer_of(args, layer + 1);
  std::int64_t* next_ids = scratch + args.top_k;
  for (std::int64_t t = 0; t < args.num_tokens; ++t) {
    const int here_count = valid_ids(here.ids + t * here.stride, args, scratch);
    const int next_count = valid_ids(next.ids + t * next.stride, args, next_ids);
    for (int i = 0; i < here_count; ++i) {
      for (int j = 0; j < next_count; ++j) ++table[scratch[i] * num_experts + next_ids[j]];
    }
  }
}

}  // namespace

void count_statistics(const StatisticsArgs& args) {
  parallel_for(args.num_layers, args.num_threads, [&](std::int64_t layer) {
    if (args.between) args.between();
    std::vector<std::int64_t> scratch(static_cast<std::size_t>(2 * args.top_k));
    count_load(args, layer);
    if (args.coactivation != nullptr) count_coactivation(args, layer, scratch.data());
    if (args.transitions != nullptr && layer + 1 < args.num_layers) {
      count_transitions(args, layer, scratch.data());
    }
  });
}

}  // namespace moetuner
