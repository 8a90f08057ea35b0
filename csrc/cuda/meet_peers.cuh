#pragma once

// What one block of a dispatch does for all: it tells the peers what comes to them, waits for what
// they tell, and makes of it the places of the rows that come here.

#include "carry_rows.cuh"
#include "count_routing.cuh"
#include "moetuner/ops/ids.h"
#include "peer_waits.cuh"
#include "route_tiles.cuh"

#include <cub/block/block_scan.cuh>
#include <cuda_runtime.h>

namespace moetuner::transport {

constexpr std::int64_t kMostChoices = 0x7fffffff;  // that a map of int32 can tell apart

/// The first row of each sender's choices in each slot here, [G, S].
__device__ inline std::int32_t* bases_of(const Peers& peers) {
  return reinterpret_cast<std::int32_t*>(peers.control + 1);
}

/// Tells every rank, this one too, what comes to it.
template <typename Id>
__device__ void tell_counts(const DispatchArgs<Id>& args,
                            const Tiling& tiling,
                            const PeerView& view,
                            const int* total) {
  const int num_ranks = view.num_ranks();
  const int slots = static_cast<int>(args.slots_per_rank);
  const int head = static_cast<int>(WindowLayout::kCountHead);
  const int values = slots + head;
  const auto rows_to = [&](int g) {
    const int rows = total[tiling.num_slots + g];
    return args.capacity > 0 ? min(rows, static_cast<int>(args.capacity)) : rows;
  };
  for (int i = threadIdx.x; i < num_ranks * values; i += kThreads) {
    const int g = i / values;
    const int at = i % values;
    int value = at < head ? rows_to(g) : total[g * slots + at - head];
    for (int other = 0; at == 1 && other < num_ranks; ++other) value = max(value, rows_to(other));
    store_relaxed(view.counts(g, view.rank()) + at,
                  uint2{static_cast<std::uint32_t>(value), view.epoch()});
  }
  const int g = static_cast<int>(threadIdx.x);
  if (g < num_ranks) store_relaxed(view.arrived(g, view.rank()), view.epoch());
}

/// The counters of this rank's tokens, and what they add to the overflow.
template <typename Id>
__device__ void count_tokens(const DispatchArgs<Id>& args, const Tiling& tiling, const int* total) {
  if (args.counters) {
    const int others = tiling.num_ranks + tiling.num_nodes;
    for (int i = threadIdx.x; i < tiling.columns; i += kThreads) {
      const int at = i < tiling.num_slots ? i + others : i - tiling.num_slots;
      args.counters[1 + at] = total[i];
    }
    if (threadIdx.x == 0) args.counters[0] = tiling.num_tokens;
  }
  const int g = static_cast<int>(threadIdx.x);
  if (args.passed_on && g < tiling.num_ranks) {
    args.passed_on[g] = total[tiling.num_slots + g];
  }
  if (args.overflow && threadIdx.x == 0) {
    int lost = 0;
    for (int other = 0; other < tiling.num_ranks; ++other) {
      lost += max(total[tiling.num_slots + other] - static_cast<int>(args.capacity), 0);
    }
    *args.overflow += lost;
  }
}

/// Waits for the counts of all ranks, into `counts` [G, kCountHead + S].
template <typename Id>
__device__ bool await_counts(const DispatchArgs<Id>& args, const PeerView& view, int* counts) {
  const int values = static_cast<int>(args.slots_per_rank + WindowLayout::kCountHead);
  bool ok = true;
  for (int i = threadIdx.x; i < view.num_ranks() * values; i += kThreads) {
    const int g = i / values;
    const uint2* from = view.counts(view.rank(), g) + i % values;
    uint2 value{};
    ok &= view.wait(Wait::kCounts, g, [&] {
      value = load_relaxed(from);
      return value.y == view.epoch();
    });
    counts[i] = static_cast<int>(value.x);
  }
  return __syncthreads_and(ok);
}

/// Makes of the counts the places of what comes.
template <typename Id>
__device__ void place_arrivals(const DispatchArgs<Id>& args,
                               const Peers& peers,
                               const Tiling& tiling,
                               const PeerView& view,
                               const int* rows_to,
                               const int* counts) {
  using Scan = cub::BlockScan<int, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage storage;
  const int num_ranks = view.num_ranks();
  const int slots = static_cast<int>(args.slots_per_rank);
  const int head = static_cast<int>(WindowLayout::kCountHead);
  const int values = slots + head;
  std::int32_t* bases = bases_of(peers);
  std::int64_t end_of_all = 0;
  for (int start = 0; start < slots; start += kThreads) {
    const int p = start + static_cast<int>(threadIdx.x);
    int count = 0;
    for (int s = 0; s < num_ranks && p < slots; ++s) count += counts[s * values + head + p];
    int before = 0;
    int sum = 0;
    Scan(storage).ExclusiveSum(count, before, sum);
    if (p < slots) {
      std::int64_t next = end_of_all + before;
      for (int s = 0; s < num_ranks; ++s) {
        bases[s * slots + p] = static_cast<std::int32_t>(next);
        next += counts[s * values + head + p];
      }
      args.end_offsets[p] =
          static_cast<std::int32_t>(args.capacity > 0 ? min(next, args.max_rows) : next);
    }
    end_of_all += sum;
    __syncthreads();
  }
  const int g = static_cast<int>(threadIdx.x);
  if (g < num_ranks) {
    tiling.received[g] = counts[g * values];
    if (args.ticket != 0) {
      peers.host->sent[g] = rows_to[g];
      peers.host->received[g] = counts[g * values];
    }
  }
  __syncthreads();
  if (g != 0) return;
  int largest = 0;
  for (int s = 0; s < num_ranks; ++s) largest = max(largest, counts[s * values + 1]);
  tiling.received[num_ranks] = largest;
  tiling.received[num_ranks + 1] = static_cast<std::int32_t>(min(end_of_all, kMostChoices));
  store_release_here(&peers.control->placed, view.epoch());
  if (args.overflow) {
    *args.overflow += static_cast<int>(max(end_of_all - args.max_rows, std::int64_t{0}));
  }
  if (args.ticket != 0) {
    peers.host->num_choices = end_of_all;
    peers.host->largest = largest;
    store_release(&peers.host->ticket, args.ticket);
  }
}

/// The last block's part, and the refusal of ids that any block has read: in those it would cost
/// registers. `counts` has room for those of all ranks.
template <typename Id>
__device__ void meet_peers(const DispatchArgs<Id>& args,
                           const Peers& peers,
                           const Tiling& tiling,
                           const PeerView& view,
                           const int* total,
                           int* counts) {
  __shared__ int rows_to[kMaxPeers];
  tell_counts(args, tiling, view, total);
  const int g = static_cast<int>(threadIdx.x);
  if (g < view.num_ranks()) {
    const int rows = total[tiling.num_slots + g];
    rows_to[g] = args.capacity > 0 ? min(rows, static_cast<int>(args.capacity)) : rows;
  }
  if (await_counts(args, view, counts)) place_arrivals(args, peers, tiling, view, rows_to, counts);
  if constexpr (sizeof(Id) > sizeof(std::int32_t)) {
    refuse_wide(__ldcg(&peers.control->wide) != 0, "dispatch: topk_ids");
  }
}

}  // namespace moetuner::transport
