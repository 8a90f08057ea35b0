#include "moetuner/tally.h"

#include "layer_tally.h"
#include "moetuner/parallel.h"
#include "replicas.h"

#include <algorithm>
#include <functional>
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

/// Adds the token once from every rank, one unit each.
void add_from_everywhere(LayerTally& tally, std::int64_t token, std::int64_t num_ranks) {
  for (std::int64_t home = 0; home < num_ranks; ++home) tally.add_token(token, home, 1);
}

void tally_uniform(const TallyArgs& args, const std::vector<Replicas>& replicas) {
  for_each_layer(args, replicas, [&](LayerTally& tally, std::int64_t layer) {
    if (!replicas[layer].any()) return tally.add_uniform_homes();
    for (std::int64_t t = 0; t < args.num_tokens; ++t) {
      add_from_everywhere(tally, t, args.num_ranks);
    }
  });
}

void tally_recorded(const TallyArgs& args, const std::vector<Replicas>& replicas) {
  for_each_layer(args, replicas, [&](LayerTally& tally, std::int64_t) {
    for (std::int64_t t = 0; t < args.num_tokens; ++t) tally.add_token(t, args.home_rank[t], 1);
  });
}

constexpr std::int64_t kUnknownHome = -1;

/// Home of every token at every layer when the first home is `start`: [T, L].
///
/// From an unknown start a home stays unknown until the token's first expert that is not padding.
std::vector<std::int16_t> follow_homes(const TallyArgs& args,
                                       const std::vector<Replicas>& replicas,
                                       std::int64_t start) {
  std::vector<std::int16_t> homes(static_cast<std::size_t>(args.num_tokens * args.num_layers));
  constexpr std::int64_t kChunk = 4096;
  const std::int64_t num_chunks = (args.num_tokens + kChunk - 1) / kChunk;
  parallel_for(num_chunks, args.num_threads, [&](std::int64_t chunk) {
    const std::int64_t end = std::min(args.num_tokens, (chunk + 1) * kChunk);
    for (std::int64_t t = chunk * kChunk; t < end; ++t) {
      std::int64_t home = start;
      for (std::int64_t l = 0; l < args.num_layers; ++l) {
        homes[t * args.num_layers + l] = static_cast<std::int16_t>(home);
        const std::int64_t first = args.topk_ids[(t * args.num_layers + l) * args.top_k];
        if (first < 0 || first >= args.num_experts) continue;
        const std::int64_t slot = replicas[l].pick(first, home, t);
        if (slot >= 0) home = replicas[l].rank_of(slot);
      }
    }
  });
  return homes;
}

/// Replicas make a token's whole path depend on where it starts, so then every start is walked;
/// without them only the layers before its first expert do.
void tally_follow(const TallyArgs& args, const std::vector<Replicas>& replicas) {
  const bool any =
      std::any_of(replicas.begin(), replicas.end(), [](const Replicas& r) { return r.any(); });
  const std::int64_t weight = any ? 1 : args.num_ranks;
  for (std::int64_t start = any ? 0 : kUnknownHome; start < (any ? args.num_ranks : 0); ++start) {
    const std::vector<std::int16_t> homes = follow_homes(args, replicas, start);
    for_each_layer(args, replicas, [&](LayerTally& tally, std::int64_t layer) {
      for (std::int64_t t = 0; t < args.num_tokens; ++t) {
        const std::int64_t home = homes[t * args.num_layers + layer];
        if (home == kUnknownHome) {
          add_from_everywhere(tally, t, args.num_ranks);
        } else {
          tally.add_token(t, home, weight);
        }
      }
    });
  }
}

}  // namespace

std::int64_t tally_scale(Homes homes, std::int64_t num_ranks) {
  return homes == Homes::kRecorded ? 1 : num_ranks;
}

void tally_routing(const TallyArgs& args) {
  std::vector<Replicas> replicas;
  replicas.reserve(static_cast<std::size_t>(args.num_layers));
  for (std::int64_t layer = 0; layer < args.num_layers; ++layer) replicas.emplace_back(args, layer);
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
