#include "moetuner/planning/tally.h"

#include "moetuner/planning/parallel.h"
#include "planning/tally/layer_tally.h"
#include "planning/tally/replicas.h"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <vector>

namespace moetuner {
namespace {

using LayerBody = std::function<void(LayerTally&, std::int64_t layer)>;

void for_each_layer(const TallyArgs& args,
                    const std::vector<Replicas>& replicas,
                    const LayerBody& body) {
  parallel_for(args.num_layers, args.num_threads, [&](std::int64_t layer) {
    LayerTally tally(args, layer, replicas[layer]);
    body(tally, layer);
  });
}

void tally_uniform(const TallyArgs& args, const std::vector<Replicas>& replicas) {
  for_each_layer(
      args, replicas, [](LayerTally& tally, std::int64_t) { tally.add_uniform_homes(); });
}

void tally_recorded(const TallyArgs& args, const std::vector<Replicas>& replicas) {
  for_each_layer(args, replicas, [&](LayerTally& tally, std::int64_t) {
    for (std::int64_t t = 0; t < args.num_tokens; ++t) tally.add_token(t, args.home_rank[t], 1);
  });
}

/// From how many of the G ranks that a token may start on it comes to a rank: starts[l * G + g],
/// for its layers l. Paths that meet go on as one; without replicas all do at its first expert.
void follow(const TallyArgs& args,
            const std::vector<Replicas>& replicas,
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
      const std::int64_t slot = padding ? -1 : replicas[l].pick(first, home, token);
      starts[num_ranks + (slot < 0 ? home : replicas[l].rank_of(slot))] += starts[home];
    }
  }
}

void tally_follow(const TallyArgs& args, const std::vector<Replicas>& replicas) {
  constexpr std::int64_t kPathCells = std::int64_t{1} << 24;  // 64 MiB of paths kept at a time
  constexpr std::int64_t kPart = 256;                         // tokens of one task
  const std::int64_t path = args.num_layers * args.num_ranks;
  const std::int64_t chunk = std::max(kPathCells / path, kPart);
  std::vector<std::int32_t> starts(
      static_cast<std::size_t>(std::min(args.num_tokens, chunk) * path));
  for (std::int64_t begin = 0; begin < args.num_tokens; begin += chunk) {
    const std::int64_t end = std::min(args.num_tokens, begin + chunk);
    parallel_for((end - begin + kPart - 1) / kPart, args.num_threads, [&](std::int64_t part) {
      const std::int64_t first = begin + part * kPart;
      for (std::int64_t t = first; t < std::min(end, first + kPart); ++t) {
        follow(args, replicas, t, starts.data() + (t - begin) * path);
      }
    });
    for_each_layer(args, replicas, [&](LayerTally& tally, std::int64_t layer) {
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

void tally_routing(const TallyArgs& args) {
  std::vector<Replicas> replicas;
  replicas.reserve(static_cast<std::size_t>(args.num_layers));
  for (std::int64_t layer = 0; layer < args.num_layers; ++layer) {
    replicas.emplace_back(LayerSlots{.experts = args.slot_experts + layer * args.num_slots,
                                     .num_slots = args.num_slots,
                                     .num_experts = args.num_experts,
                                     .num_ranks = args.num_ranks,
                                     .ranks_per_node = args.ranks_per_node});
  }
  switch (args.homes) {
    case Homes::kUniform:
      return tally_uniform(args, replicas);
    case Homes::kRecorded:
      return tally_recorded(args, replicas);
    case Homes::kFollow:
      return tally_follow(args, replicas);
  }
}

}  // namespace moetuner
