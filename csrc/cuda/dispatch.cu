// One thread finds the slots of one token, then its ranks in rising order by a mask of 64 ranks at
// a time. `spread` does the same for a row that crossed between nodes, whose slots came with it.
// Counts are added up in shared memory, one table per block:
//
//     [ rows of each rank: G ][ choices of each rank: G ][ rows of each node: N ][ choices of each
//     slot: P ]

#include "count_routing.cuh"
#include "launch.cuh"
#include "moetuner/ops/dispatch.h"
#include "moetuner/ops/ids.h"

#include <cuda_runtime.h>

#include <algorithm>

namespace moetuner::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 1024;
constexpr std::int64_t kBlankPerThread = 16;

template <typename Id>
__device__ std::int32_t slot_of(const RouteArgs<Id>& args,
                                std::int64_t token,
                                std::int64_t choice) {
  const std::int32_t expert = read_id(args.topk_ids, choice, "dispatch: topk_ids");
  if (expert < 0 || expert >= args.num_experts) return -1;
  const std::int32_t count = args.num_candidates[expert];
  if (count < 1 || count > args.max_candidates) return -1;
  const std::int32_t slot = args.candidates[expert * args.max_candidates + token % count];
  return slot < args.num_ranks * args.slots_per_rank ? slot : -1;
}

/// What a block counts, in shared memory.
struct Table {
  int *rows, *choices, *nodes, *slots;

  template <typename Id>
  __device__ Table(const RouteArgs<Id>& args, int* memory)
      : rows(memory),
        choices(rows + args.num_ranks),
        nodes(choices + args.num_ranks),
        slots(nodes + args.num_ranks / args.ranks_per_node) {}

  template <typename Id>
  static __host__ __device__ std::int64_t size(const RouteArgs<Id>& args) {
    if (!args.counts && !args.counters) return 0;
    return 2 * args.num_ranks + args.num_ranks / args.ranks_per_node +
           args.num_ranks * args.slots_per_rank;
  }
};

/// Calls `visit` with each rank, of `num_ranks` whose slots begin at `first_slot`, that has one of
/// the slots, in rising order.
template <typename Visit>
__device__ void for_each_rank(const std::int32_t* slots,
                              int top_k,
                              int first_slot,
                              int slots_per_rank,
                              int num_ranks,
                              const Visit& visit) {
  for (int base = 0; base < num_ranks; base += 64) {
    unsigned long long mask = 0;
    for (int k = 0; k < top_k; ++k) {
      if (slots[k] < first_slot) continue;  // -1, too: none
      const int rank = (slots[k] - first_slot) / slots_per_rank - base;
      if (rank >= 0 && rank < 64 && base + rank < num_ranks) mask |= 1ull << rank;
    }
    for (; mask != 0; mask &= mask - 1) {
      visit(base + __ffsll(static_cast<long long>(mask)) - 1);
    }
  }
}

/// Writes the places of the token whose slots are given, in rising order, and counts its ranks.
template <typename Id>
__device__ void find_places(const RouteArgs<Id>& args,
                            const std::int32_t* slots,
                            std::int32_t* destinations,
                            bool counts,
                            const Table& table) {
  int found = 0;
  int last_node = -1;
  int last_place = -1;
  const int ranks_per_node = static_cast<int>(args.ranks_per_node);
  const int ranks_per_place = static_cast<int>(args.ranks_per_place);
  const auto visit = [&](int rank) {
    const int place = rank / ranks_per_place;
    if (place != last_place) destinations[found++] = place;
    last_place = place;
    if (!counts) return;
    atomicAdd(&table.rows[rank], 1);
    const int node = rank / ranks_per_node;
    if (node != last_node) atomicAdd(&table.nodes[node], 1);
    last_node = node;
  };
  for_each_rank(slots,
                static_cast<int>(args.top_k),
                0,
                static_cast<int>(args.slots_per_rank),
                static_cast<int>(args.num_ranks),
                visit);
  while (found < args.num_destinations) destinations[found++] = -1;
}

/// Adds the block's table to the counts and counters.
template <typename Id>
__device__ void add_table(const RouteArgs<Id>& args, const int* memory, int size) {
  const int num_ranks = static_cast<int>(args.num_ranks);
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const int value = memory[i];
    if (value == 0) continue;
    if (args.counts && i < 2 * num_ranks) {
      atomicAdd(&args.counts[2 * (i % num_ranks) + i / num_ranks], value);
    }
    // Of counters, the choices of ranks are no part: those of slots say as much.
    const int at = i < num_ranks ? i : i - num_ranks;
    const bool of_ranks = i >= num_ranks && i < 2 * num_ranks;
    if (args.counters && !of_ranks) add_to(&args.counters[1 + at], value);
  }
}

template <typename Id>
__global__ void __launch_bounds__(kThreads)
    route_kernel(const __grid_constant__ RouteArgs<Id> args) {
  extern __shared__ int memory[];
  const Table table(args, memory);
  const int size = static_cast<int>(Table::size(args));
  for (int i = threadIdx.x; i < size; i += kThreads) memory[i] = 0;
  __syncthreads();
  wait_for_predecessor();
  let_successor_begin();
  const std::int64_t first = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = first; i < args.blank_size; i += step) args.blank[i] = -1;
  if (first == 0 && args.overflow) *args.overflow = 0;
  if (first == 0 && args.counters) add_to(&args.counters[0], args.num_tokens);

  const int top_k = static_cast<int>(args.top_k);
  for (std::int64_t t = first; t < args.num_tokens; t += step) {
    std::int32_t* travel = args.travel + t * 2 * top_k;
    for (int k = 0; k < top_k; ++k) {
      const std::int32_t slot = slot_of(args, t, t * top_k + k);
      travel[k] = slot;
      travel[top_k + k] = __float_as_int(args.weights[t * top_k + k]);
      if (size == 0 || slot < 0) continue;
      atomicAdd(&table.choices[slot / static_cast<int>(args.slots_per_rank)], 1);
      atomicAdd(&table.slots[slot], 1);
    }
    find_places(args, travel, args.destinations + t * args.num_destinations, size > 0, table);
  }
  __syncthreads();
  add_table(args, memory, size);
}

__global__ void __launch_bounds__(kThreads) spread_kernel(const __grid_constant__ SpreadArgs args) {
  extern __shared__ int rows[];  // [R]
  const int num_ranks = static_cast<int>(args.num_ranks);
  for (int i = threadIdx.x; i < num_ranks; i += kThreads) rows[i] = 0;
  __syncthreads();
  wait_for_predecessor();
  let_successor_begin();
  const std::int64_t first = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = first; i < args.blank_size; i += step) args.blank[i] = -1;
  for (std::int64_t i = first; i < args.num_rows; i += step) {
    std::int32_t* destinations = args.destinations + i * args.num_destinations;
    int found = 0;
    for_each_rank(args.travel + i * 2 * args.top_k,
                  static_cast<int>(args.top_k),
                  static_cast<int>(args.first_slot),
                  static_cast<int>(args.slots_per_rank),
                  num_ranks,
                  [&](int rank) {
                    destinations[found++] = rank;
                    if (args.counters) atomicAdd(&rows[rank], 1);
                  });
    while (found < args.num_destinations) destinations[found++] = -1;
  }
  if (!args.counters) return;
  __syncthreads();
  for (int i = threadIdx.x; i < num_ranks; i += kThreads) {
    if (rows[i] != 0) add_to(&args.counters[i], rows[i]);
  }
}

__global__ void unpack_kernel(const __grid_constant__ UnpackArgs args) {
  wait_for_predecessor();
  let_successor_begin();
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= args.num_rows * args.top_k) return;
  const std::int64_t at = i / args.top_k * 2 * args.top_k + i % args.top_k;
  const std::int64_t slot = args.travel[at] < 0 ? -1 : args.travel[at] - args.first_slot;
  const bool here = slot >= 0 && slot < args.slots_per_rank;
  args.slots[i] = here ? static_cast<std::int32_t>(slot) : -1;
  args.weights[i] = here ? __int_as_float(args.travel[at + args.top_k]) : 0.0f;
}

}  // namespace

template <typename Id>
void route(const RouteArgs<Id>& args, cudaStream_t stream) {
  const std::int64_t wanted = std::max(ceil_div(args.num_tokens, kThreads),
                                       ceil_div(args.blank_size, kThreads * kBlankPerThread));
  const std::int64_t shared = Table::size(args) * static_cast<std::int64_t>(sizeof(int));
  launch(route_kernel<Id>,
         {.blocks = std::clamp<std::int64_t>(wanted, 1, kMaxBlocks),
          .threads = kThreads,
          .shared_bytes = shared},
         stream,
         args);
}

void spread(const SpreadArgs& args, cudaStream_t stream) {
  const std::int64_t wanted = std::max(ceil_div(args.num_rows, kThreads),
                                       ceil_div(args.blank_size, kThreads * kBlankPerThread));
  if (wanted == 0) return;
  launch(spread_kernel,
         {.blocks = std::min(wanted, kMaxBlocks),
          .threads = kThreads,
          .shared_bytes = args.num_ranks * static_cast<std::int64_t>(sizeof(int))},
         stream,
         args);
}

void unpack(const UnpackArgs& args, cudaStream_t stream) {
  const std::int64_t blocks = ceil_div(args.num_rows * args.top_k, kThreads);
  if (blocks == 0) return;
  launch(unpack_kernel, {.blocks = blocks, .threads = kThreads}, stream, args);
}

template void route(const RouteArgs<std::int32_t>& args, cudaStream_t stream);
template void route(const RouteArgs<std::int64_t>& args, cudaStream_t stream);

}  // namespace moetuner::cuda
