#include "moetuner/planning/tally.h"

#include "moetuner/planning/parallel.h"
#include "planning/tally/layer_tally.h"
#include "planning/tally/replica_numbers.h"
#include "planning/tally/replicas.h"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <vector>

namespace moetuner {
namespace {

using LayerBody = std::function<void(LayerTally&)>;

/// The replicas of every layer, and what their rule counts by.
struct Choosing {
  std::vector<Replicas> replicas;
  std::vector<std::int32_t> homes;  // [T], recorded or dealt out; empty where nothing asks
  SourceRows rows;
};

Choosing choosing_of(const TallyArgs& args) {
  Choosing choosing;
  for (std::int64_t layer = 0; layer < args.num_layers; ++layer) {
    const std::int64_t fixed = layer * args.num_ranks * args.num_experts;
    choosing.replicas.emplace_back(
        LayerSlots{.experts = args.slot_experts + layer * args.num_slots,
                   .num_slots = args.num_slots,
                   .num_experts = args.num_experts,
                   .num_ranks = args.num_ranks,
                   .ranks_per_node = args.ranks_per_node,
                   .rule = args.replica_rule,
                   .rank_slots = args.rank_slots == nullptr ? nullptr : args.rank_slots + fixed});
  }
  const bool rows = asks_row(args.replica_rule);
  if (!rows && args.slot_used == nullptr) return choosing;
  const Batches batches{args.group, args.num_tokens, args.num_groups, args.num_ranks};
  if (args.homes == Homes::kRecorded) {
    choosing.homes.assign(args.home_rank, args.home_rank + args.num_tokens);
  } else {
    choosing.homes = deal_out(batches);
  }
  if (rows) choosing.rows = SourceRows(batches, choosing.homes.data());
  return choosing;
}

ReplicaNumbers numbers_of(const TallyArgs& args, const Choosing& choosing, std::int64_t layer) {
  return {args.replica_rule,
          {.topk_ids = args.topk_ids,
           .num_tokens = args.num_tokens,
           .num_layers = args.num_layers,
           .top_k = args.top_k,
           .num_experts = args.num_experts,
           .layer = layer,
           .token = nullptr},
          choosing.rows};
}

/// Threads for the tally: to start one takes longer than to count a few thousand choices.
int threads_of(const TallyArgs& args) {
  constexpr std::int64_t kFewChoices = 4096;
  const bool few = args.num_tokens * args.num_layers * args.top_k <= kFewChoices;
  return few ? 1 : args.num_threads;
}

/// `parallel_for`, with a look at what may end it before each piece.
void in_pieces(const TallyArgs& args,
               std::int64_t count,
               const std::function<void(std::int64_t)>& body) {
  parallel_for(count, threads_of(args), [&](std::int64_t piece) {
    if (args.between) args.between();
    body(piece);
  });
}

void for_each_layer(const TallyArgs& args, const Choosing& choosing, const LayerBody& body) {
  in_pieces(args, args.num_layers, [&](std::int64_t layer) {
    const ReplicaNumbers numbers = numbers_of(args, choosing, layer);
    LayerTally tally(args, layer, choosing.replicas[layer], numbers);
    body(tally);
  });
}

void tally_uniform(const TallyArgs& args, const Choosing& choosing) {
  const std::int32_t* dealt = args.slot_used == nullptr ? nullptr : choosing.homes.data();
  for_each_layer(args, choosing, [&](LayerTally& tally) { tally.add_uniform_homes(dealt); });
}

void tally_recorded(const TallyArgs& args, const Choosing& choosing) {
  for_each_layer(args, choosing, [&](LayerTally& tally) {
    for (std::int64_t t = 0; t < args.num_tokens; ++t) tally.add_token(t, args.home_rank[t], 1);
  });
}

/// From how many of the G ranks that a token may start on it comes to a rank: starts[l * G + g],
/// for its layers l. Paths that meet go on as one; without replicas all do at its first expert.
void follow(const TallyArgs& args,
            const std::vector<Replicas>& replicas,
            const std::vector<ReplicaNumbers>& numbers,
            std::int64_t token,
            std::int32_t* starts) {
  const std::int64_t num_ranks = args.num_ranks;
  std::fill_n(starts, num_ranks, 1);
  for (std::int64_t l = 0; l + 1 < args.num_layers; ++l, starts += num_ranks) {
    const std::int64_t first = args.topk_ids[(token * args.num_layers + l) * args.top_k];
    const bool padding = first < 0 || first >= args.num_experts;
    std::fill_n(starts + num_ranks, num_ranks, 0);
    for (std::int64_t home = 0; home < num_ranks; ++home) {
      if (starts[home] == 0) continue;
      const std::int64_t slot =
          padding ? -1 : replicas[l].pick(first, home, numbers[l].of(token, 0, first));
      starts[num_ranks + (slot < 0 ? home : replicas[l].rank_of(slot))] += starts[home];
    }
  }
}

void tally_follow(const TallyArgs& args, const Choosing& choosing) {
  std::vector<ReplicaNumbers> numbers;
  for (std::int64_t l = 0; l < args.num_layers; ++l) {
    numbers.push_back(numbers_of(args, choosing, l));
  }
  constexpr std::int64_t kPathCells = std::int64_t{1} << 24;  // 64 MiB of paths kept at a time
  constexpr std::int64_t kPart = 256;                         // tokens of one task
  const std::int64_t path = args.num_layers * args.num_ranks;
  const std::int64_t chunk = std::max(kPathCells / path, kPart);
  std::vector<std::int32_t> starts(
      static_cast<std::size_t>(std::min(args.num_tokens, chunk) * path));
  for (std::int64_t begin = 0; begin < args.num_tokens; begin += chunk) {
    const std::int64_t end = std::min(args.num_tokens, begin + chunk);
    in_pieces(args, (end - begin + kPart - 1) / kPart, [&](std::int64_t part) {
      const std::int64_t first = begin + part * kPart;
      for (std::int64_t t = first; t < std::min(end, first + kPart); ++t) {
        follow(args, choosing.replicas, numbers, t, starts.data() + (t - begin) * path);
      }
    });
    in_pieces(args, args.num_layers, [&](std::int64_t layer) {
      LayerTally tally(args, layer, choosing.replicas[layer], numbers[layer]);
      for (std::int64_t t = begin; t < end; ++t) {
        const std::int32_t* here = starts.data() + (t - begin) * path + layer * args.num_ranks;
        for (std::int64_t home = 0; home < args.num_ranks; ++home) {
          if (here[home] > 0) tally.add_token(t, home, here[home]);
        }
      }
    });
  }
}

}  // namespace

std::int64_t tally_scale(Homes homes, std::int64_t num_ranks) {
  switch (homes) {
    case Homes::kUniform:
    case Homes::kFollow:
      return num_ranks;
    case Homes::kRecorded:
      return 1;
  }
  throw std::invalid_argument("tally_scale: no such homes");
}

bool deals_out(Homes homes, ReplicaRule rule) {
  return homes == Homes::kUniform && asks_home(rule) && rule != ReplicaRule::kMoetuner;
}

void tally_routing(const TallyArgs& args) {
  const Choosing choosing = choosing_of(args);
  switch (args.homes) {
    case Homes::kUniform:
      return tally_uniform(args, choosing);
    case Homes::kRecorded:
      return tally_recorded(args, choosing);
    case Homes::kFollow:
      return tally_follow(args, choosing);
  }
}

}  // namespace moetuner
