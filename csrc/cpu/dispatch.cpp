#include "moetuner/ops/dispatch.h"

#include "moetuner/ops/ids.h"

#include <algorithm>
#include <bit>
#include <set>

namespace moetuner::cpu {
namespace {

template <typename Id>
std::int32_t slot_of(const RouteArgs<Id>& args, std::int64_t token, std::int64_t k) {
  const std::int32_t expert = read_id(args.topk_ids, token * args.top_k + k, "dispatch: topk_ids");
  if (expert < 0 || expert >= args.num_experts) return -1;
  const std::int32_t count = args.num_candidates[expert];
  if (count < 1 || count > args.max_candidates) return -1;
  const std::int32_t slot = args.candidates[expert * args.max_candidates + token % count];
  return slot < args.num_slots() ? slot : -1;
}

template <typename Id>
void count(const RouteArgs<Id>& args,
           const std::int32_t* slots,
           const std::set<std::int64_t>& ranks) {
  std::int64_t* rows = args.counters + 1;
  std::int64_t* nodes = rows + args.num_ranks;
  std::int64_t* choices = nodes + args.num_nodes();
  std::int64_t last_node = -1;
  for (const std::int64_t rank : ranks) {
    ++rows[rank];
    const std::int64_t node = rank / args.ranks_per_node;
    nodes[node] += node != last_node;
    last_node = node;
  }
  for (std::int64_t k = 0; k < args.top_k; ++k) {
    if (slots[k] >= 0) ++choices[slots[k]];
  }
}

/// Places in rising order, then -1.
void write(const std::set<std::int64_t>& places,
           std::int32_t* destinations,
           std::int64_t num_destinations) {
  std::fill_n(destinations, num_destinations, -1);
  std::copy(places.begin(), places.end(), destinations);
}

}  // namespace

template <typename Id>
void route(const RouteArgs<Id>& args) {
  if (args.blank) std::fill_n(args.blank, args.blank_size, -1);
  if (args.overflow) *args.overflow = 0;
  if (args.counters) args.counters[0] += args.num_tokens;
  for (std::int64_t t = 0; t < args.num_tokens; ++t) {
    std::int32_t* slots = args.travel + t * 2 * args.top_k;
    std::set<std::int64_t> ranks;
    for (std::int64_t k = 0; k < args.top_k; ++k) {
      slots[k] = slot_of(args, t, k);
      slots[args.top_k + k] = std::bit_cast<std::int32_t>(args.weights[t * args.top_k + k]);
      if (slots[k] < 0) continue;
      const std::int64_t rank = slots[k] / args.slots_per_rank;
      ranks.insert(rank);
      if (args.counts) ++args.counts[2 * rank + 1];
    }
    std::set<std::int64_t> places;
    for (const std::int64_t rank : ranks) places.insert(rank / args.ranks_per_place);
    write(places, args.destinations + t * args.num_destinations, args.num_destinations);
    for (const std::int64_t rank : ranks) {
      if (args.counts) ++args.counts[2 * rank];
    }
    if (args.counters) count(args, slots, ranks);
  }
}

void spread(const SpreadArgs& args) {
  if (args.blank) std::fill_n(args.blank, args.blank_size, -1);
  for (std::int64_t i = 0; i < args.num_rows; ++i) {
    std::set<std::int64_t> ranks;
    for (std::int64_t k = 0; k < args.top_k; ++k) {
      const std::int64_t slot = args.travel[i * 2 * args.top_k + k] - args.first_slot;
      if (slot >= 0 && slot < args.num_ranks * args.slots_per_rank) {
        ranks.insert(slot / args.slots_per_rank);
      }
    }
    write(ranks, args.destinations + i * args.num_destinations, args.num_destinations);
    if (!args.counters) continue;
    for (const std::int64_t rank : ranks) ++args.counters[rank];
  }
}

void unpack(const UnpackArgs& args) {
  for (std::int64_t i = 0; i < args.num_rows * args.top_k; ++i) {
    const std::int64_t at = i / args.top_k * 2 * args.top_k + i % args.top_k;
    const std::int64_t slot = args.travel[at] < 0 ? -1 : args.travel[at] - args.first_slot;
    const bool here = slot >= 0 && slot < args.slots_per_rank;
    args.slots[i] = here ? static_cast<std::int32_t>(slot) : -1;
    args.weights[i] = here ? std::bit_cast<float>(args.travel[at + args.top_k]) : 0.0f;
  }
}

template void route(const RouteArgs<std::int32_t>& args);
template void route(const RouteArgs<std::int64_t>& args);

}  // namespace moetuner::cpu
