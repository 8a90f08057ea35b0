#pragma once

// Where the rows of choices go. A tile is some consecutive choices of one block; for each expert
//
//     total[e], before[e]   all choices of it, those before the tile
//
// then become the end of its rows and the next row of it that the tile fills.

#include "launch.cuh"
#include "moetuner/ops/ids.h"
#include "moetuner/ops/permute.h"

#include <cub/block/block_scan.cuh>
#include <cuda_runtime.h>

namespace moetuner::cuda {

template <typename Id>
__device__ int expert_of(const PermuteArgs<Id>& args, std::int64_t choice) {
  const std::int32_t id = read_id(args.topk_ids, choice, "permute: topk_ids");
  if (id < 0 || id >= args.num_ids) return -1;
  const int expert = args.expert_map ? args.expert_map[id] : id;
  return expert < args.num_experts ? expert : -1;
}

/// Adds up total[e] and before[e] from the ids of all tokens; the tile starts at `first_choice`.
template <typename Id>
__device__ void count_all(const PermuteArgs<Id>& args,
                          std::int64_t first_choice,
                          int* total,
                          int* before) {
  const int num_choices = static_cast<int>(args.num_tokens * args.top_k);
#pragma unroll 4
  for (int i = threadIdx.x; i < num_choices; i += blockDim.x) {
    const int expert = expert_of(args, i);
    if (expert < 0) continue;
    atomicAdd(&total[expert], 1);
    if (i < first_choice) atomicAdd(&before[expert], 1);
  }
}

/// Adds up total[e] and before[e] from counts[tile, e]; there is a tile for each block.
__device__ inline void sum_tiles(const std::int32_t* counts,
                                 int num_experts,
                                 int* total,
                                 int* before) {
  // Threads side by side read experts side by side; further threads share out the tiles.
  const int threads = static_cast<int>(blockDim.x);
  const int width = min(num_experts, threads);
  const int groups = threads / width;
  const int group = static_cast<int>(threadIdx.x) / width;
  if (group >= groups) return;
  for (int e = static_cast<int>(threadIdx.x) % width; e < num_experts; e += width) {
    int sum = 0;
    int sum_before = 0;
#pragma unroll 32
    for (int tile = group; tile < static_cast<int>(gridDim.x); tile += groups) {
      const int count = counts[tile * num_experts + e];
      sum += count;
      if (tile < static_cast<int>(blockIdx.x)) sum_before += count;
    }
    atomicAdd(&total[e], sum);
    atomicAdd(&before[e], sum_before);
  }
}

/// Turns total[e] into the end of expert e's filled rows and before[e] into the tile's next row of
/// it, which may be past what it may fill. Returns the end of all experts; block 0 writes that of
/// each.
template <int kThreads, typename Id>
__device__ std::int64_t place_experts(const PermuteArgs<Id>& args, int* total, int* before) {
  using Scan = cub::BlockScan<int, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage storage;
  const int num_experts = static_cast<int>(args.num_experts);
  const int alignment = static_cast<int>(args.alignment);
  const int capacity = static_cast<int>(args.capacity);
  const int num_rows = static_cast<int>(args.num_rows);
  int end_of_all = 0;
  for (int base = 0; base < num_experts; base += kThreads) {
    const int e = base + static_cast<int>(threadIdx.x);
    const int count = e < num_experts ? total[e] : 0;
    const int size = capacity ? capacity : (count + alignment - 1) / alignment * alignment;
    int start = 0;
    int sum = 0;
    Scan(storage).ExclusiveSum(size, start, sum);
    start += end_of_all;
    if (e < num_experts) {
      const int room = max(min(size, num_rows - start), 0);
      const int filled = start + min(count, room);
      total[e] = filled;
      before[e] += start;
      if (blockIdx.x == 0) {
        args.end_offsets[e] = capacity ? filled : min(start + size, num_rows);
        if (args.overflow && count > room) atomicAdd(args.overflow, count - room);
      }
    }
    end_of_all += sum;
    __syncthreads();
  }
  return end_of_all;
}

/// One warp gives each of the choices [first, last) the next of its expert, in order, and passes
/// it to `keep(choice, next)`; -1 where it has no expert here.
template <typename Id, typename Keep>
__device__ void rank_choices(const PermuteArgs<Id>& args,
                             std::int64_t first,
                             std::int64_t last,
                             int* next,
                             const Keep& keep) {
  for (std::int64_t base = first; base < last; base += kWarp) {
    const std::int64_t i = base + lane_index();
    const int expert = i < last ? expert_of(args, i) : -1;
    const unsigned int same = __match_any_sync(kAllLanes, expert);
    const int rank = __popc(same & ((1u << lane_index()) - 1));
    int found = expert < 0 ? -1 : next[expert] + rank;
    const std::int64_t limit = args.capacity ? (expert + 1) * args.capacity : args.num_rows;
    if (found >= limit) found = -1;
    __syncwarp();
    if (expert >= 0 && rank == 0) next[expert] += __popc(same);
    __syncwarp();
    if (i < last) keep(i, found);
  }
}

/// Zeroes one row by one warp.
__device__ inline void clear_row(void* rows, std::int64_t row, std::int64_t bytes) {
  const auto clear = [&]<typename Word>(Word zero) {
    const std::int64_t words = bytes / static_cast<std::int64_t>(sizeof(Word));
    auto* first = static_cast<Word*>(rows) + row * words;
    for (std::int64_t w = lane_index(); w < words; w += kWarp) first[w] = zero;
  };
  const auto address = reinterpret_cast<std::uintptr_t>(rows) | static_cast<std::uintptr_t>(bytes);
  address % 16 == 0 ? clear(uint4{0, 0, 0, 0}) : clear(std::uint8_t{0});
}

/// Zeroes, by all blocks, the rows between the experts, which are filled up to filled[e], and those
/// behind the last.
template <typename Id>
__device__ void clear_padding(const PermuteArgs<Id>& args,
                              const std::int32_t* filled,
                              std::int64_t end_of_all,
                              const Warps& warps) {
  if (warps.index < 0 || !args.clears) return;
  const auto clear = [&](std::int64_t row) {
    clear_row(args.rows, row, args.row_bytes);
    if (args.scales) clear_row(args.row_scales, row, args.scale_bytes);
  };
  const int alignment = static_cast<int>(args.alignment);
  const int blocks = static_cast<int>(gridDim.x);
  if (alignment > 1) {
    for (int e = warps.index; e < args.num_experts; e += warps.count) {
      // Each expert's first row of padding falls to another block: most have fewer than blocks.
      const int turn = static_cast<int>(std::int64_t{e} * alignment % blocks);
      // Unsigned: near 2^31 rows the sums pass it.
      const unsigned int begin = filled[e];
      const unsigned int end = (begin + alignment - 1) / alignment * alignment;
      const unsigned int first = begin + (static_cast<int>(blockIdx.x) + blocks - turn) % blocks;
      for (unsigned int row = first; row < end; row += blocks) clear(row);
    }
  }
  for (std::int64_t row = end_of_all + std::int64_t{blockIdx.x} * warps.count + warps.index;
       row < args.num_rows;
       row += std::int64_t{gridDim.x} * warps.count) {
    clear(row);
  }
}

}  // namespace moetuner::cuda
