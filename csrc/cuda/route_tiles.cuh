#pragma once

// Slots, ranks and places of all tokens by some blocks, each of which has a tile of them. A tile's
// table of counts, and what all tiles before it and all together add up to, is
//
//     [ choices of each slot: P ][ rows to each rank: G ][ rows to each node: N ]
//
// Per token, in the workspace:
//
//     travel   [ slot of each choice: K ][ its place among this rank's choices of that slot: K ]
//              [ bits of its weight: K ]
//     visits   [ rank, row among this rank's rows to it ]: D; -1: no more, or no room
//     ranks    a bit for each rank that it goes to

#include "launch.cuh"
#include "moetuner/ops/ids.h"
#include "moetuner/transport/exchange.h"

#include <cuda_runtime.h>

#include <algorithm>

namespace moetuner::transport {

using namespace moetuner::cuda;

constexpr int kTileChoices = 1024;  // of a tile that is kept in shared memory

/// Sizes that all parts of a dispatch derive alike, and where its workspace has what.
struct Tiling {
  int num_tiles, num_ranks, num_nodes, num_slots, columns, top_k, num_destinations;
  std::int64_t num_tokens;
  std::int32_t *visits, *travel, *own_tokens, *counts, *kept_counts;
  std::int32_t* received;  // [G + 2], rows from each rank; most of any rank; choices that come
  std::uint32_t* ranks;

  template <typename Id>
  __host__ __device__ Tiling(const DispatchArgs<Id>& args, int ranks_of_group, int tiles)
      : num_tiles(tiles),
        num_ranks(ranks_of_group),
        num_nodes(ranks_of_group / static_cast<int>(args.ranks_per_node)),
        num_slots(ranks_of_group * static_cast<int>(args.slots_per_rank)),
        columns(num_slots + num_ranks + num_nodes),
        top_k(static_cast<int>(args.top_k)),
        num_destinations(top_k < num_ranks ? top_k : num_ranks),
        num_tokens(args.num_tokens),
        visits(args.workspace),
        travel(visits + num_tokens * 2 * num_destinations),
        own_tokens(travel + num_tokens * 3 * top_k),
        counts(own_tokens + 2 * num_tokens),
        kept_counts(counts + tiles * columns),
        received(kept_counts + tiles * columns),
        ranks(reinterpret_cast<std::uint32_t*>(own_tokens + num_tokens)) {}

  __device__ std::int64_t first_token(std::int64_t tile) const {
    return num_tokens * tile / num_tiles;
  }
};

/// One block's tile; `total` and `before` are [columns], `segments` [warps that rank, P]. Slots and
/// ranks of its tokens stay in shared memory where they fit, and in the workspace else.
template <typename Id>
struct Tile {
  const DispatchArgs<Id>& args;
  const Tiling& tiling;
  int rank;             // of this process
  std::uint32_t* wide;  // set where an id is refused
  int *total, *before, *segments;
  int num_segments;
  std::int64_t begin, end;  // tokens
  std::int32_t* slots;      // [choices of the tile], a token's `slot_step` after the one before
  int slot_step;
  std::uint32_t* ranks;  // [tokens of the tile]

  __device__ Tile(const DispatchArgs<Id>& arguments,
                  const Tiling& sizes,
                  const Peers& peers,
                  int tile,
                  int* tables,
                  int segment_count)
      : args(arguments),
        tiling(sizes),
        rank(peers.rank),
        wide(&peers.control->wide),
        total(tables),
        before(tables + sizes.columns),
        segments(tables + 2 * sizes.columns + 2 * kTileChoices),
        num_segments(segment_count),
        begin(tile < sizes.num_tiles ? sizes.first_token(tile) : 0),
        end(tile < sizes.num_tiles ? sizes.first_token(tile + 1) : 0) {
    if ((end - begin) * sizes.top_k <= kTileChoices) {
      slots = tables + 2 * sizes.columns;
      slot_step = sizes.top_k;
      ranks = reinterpret_cast<std::uint32_t*>(slots + kTileChoices);
    } else {
      slots = travel(begin);
      slot_step = 3 * sizes.top_k;
      ranks = tiling.ranks + begin;
    }
  }

  __device__ std::int32_t* travel(std::int64_t token) const {
    return tiling.travel + token * 3 * tiling.top_k;
  }

  __device__ std::int32_t& slot_at(std::int64_t choice) const {
    const int i = static_cast<int>(choice - begin * tiling.top_k);
    return slots[i / tiling.top_k * std::int64_t{slot_step} + i % tiling.top_k];
  }

  __device__ void begin_at_zero() const {
    for (int i = threadIdx.x; i < tiling.columns; i += blockDim.x) before[i] = 0;
    __syncthreads();
  }

  __device__ std::int32_t slot_of(std::int64_t token, std::int64_t choice) const {
    bool is_wide = false;
    const std::int32_t expert = narrow_id(args.topk_ids[choice], is_wide);
    if (is_wide) *wide = 1;
    if (expert < 0 || expert >= args.num_experts) return -1;
    if (args.candidates == nullptr) return expert;
    const std::int32_t count = args.num_candidates[expert];
    if (count < 1 || count > args.max_candidates) return -1;
    const std::int32_t slot = args.candidates[expert * args.max_candidates + token % count];
    return slot < tiling.num_slots ? slot : -1;
  }

  /// Finds the slots and ranks of the tile's tokens, and counts them into `total`.
  __device__ void count() const {
    const int top_k = tiling.top_k;
    for (int i = threadIdx.x; i < tiling.columns; i += blockDim.x) total[i] = 0;
    __syncthreads();
    for (std::int64_t i = begin * top_k + threadIdx.x; i < end * top_k; i += blockDim.x) {
      const std::int64_t token = i / top_k;
      const int k = static_cast<int>(i % top_k);
      const std::int32_t slot = slot_of(token, i);
      slot_at(i) = slot;
      travel(token)[2 * top_k + k] = __float_as_int(args.weights[i]);
      if (slot >= 0) atomicAdd(&total[slot], 1);
    }
    __syncthreads();
    const int slots_per_rank = static_cast<int>(args.slots_per_rank);
    const int ranks_per_node = static_cast<int>(args.ranks_per_node);
    for (std::int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
      std::uint32_t mask = 0;
      for (int k = 0; k < top_k; ++k) {
        const std::int32_t slot = slot_at(t * top_k + k);
        if (slot >= 0) mask |= 1u << slot / slots_per_rank;
      }
      ranks[t - begin] = mask;
      int last_node = -1;
      for (; mask != 0; mask &= mask - 1) {
        const int g = __ffs(static_cast<int>(mask)) - 1;
        atomicAdd(&total[tiling.num_slots + g], 1);
        if (g / ranks_per_node != last_node) {
          last_node = g / ranks_per_node;
          atomicAdd(&total[tiling.num_slots + tiling.num_ranks + last_node], 1);
        }
      }
    }
    __syncthreads();
  }

  /// Writes `total` to this tile's line of `counts` [tiles, columns].
  __device__ void publish(std::int32_t* counts, int tile, int columns) const {
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
      counts[static_cast<std::int64_t>(tile) * columns + i] = total[i];
    }
  }

  /// All tiles' counts into `total`, those of tiles before this one into `before`.
  __device__ void add_up(const std::int32_t* counts, int tile, int columns) const {
    __syncthreads();
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
      int sum = 0;
      int sum_before = 0;
#pragma unroll 16
      for (int other = 0; other < tiling.num_tiles; ++other) {
        const int count = __ldcg(counts + other * columns + i);
        sum += count;
        if (other < tile) sum_before += count;
      }
      total[i] = sum;
      before[i] = sum_before;
    }
    __syncthreads();
  }

  /// Gives each token its row among those to each of its ranks, a warp a rank.
  __device__ void place_rows(const std::int64_t* first_sent) const {
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    for (int g = warp_index(); g < tiling.num_ranks; g += warps) {
      int next = before[tiling.num_slots + g];
      for (std::int64_t base = begin; base < end; base += kWarp) {
        const std::int64_t t = base + lane_index();
        const std::uint32_t mask = t < end ? ranks[t - begin] : 0;
        const bool goes = mask >> g & 1;
        const unsigned int all = __ballot_sync(kAllLanes, goes);
        const int row = next + __popc(all & ((1u << lane_index()) - 1));
        next += __popc(all);
        if (!goes) continue;
        const bool kept = args.capacity == 0 || row < args.capacity;
        const std::int64_t at = t * tiling.num_destinations + __popc(mask & ((1u << g) - 1));
        tiling.visits[2 * at] = g;
        tiling.visits[2 * at + 1] = kept ? row : -1;
        args.send_map[at] = kept ? static_cast<std::int32_t>(first_sent[g] + row) : -1;
        if (kept && g == rank) tiling.own_tokens[row] = static_cast<std::int32_t>(t);
      }
    }
    for (std::int64_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
      for (int j = __popc(ranks[t - begin]); j < tiling.num_destinations; ++j) {
        const std::int64_t at = t * tiling.num_destinations + j;
        tiling.visits[2 * at] = -1;
        tiling.visits[2 * at + 1] = -1;
        args.send_map[at] = -1;
      }
    }
  }

  /// Takes away the choices whose row has no room, and counts those that are left into `total`.
  __device__ void drop_choices() const {
    __syncthreads();
    for (int p = threadIdx.x; p < tiling.num_slots; p += blockDim.x) total[p] = 0;
    __syncthreads();
    const int top_k = tiling.top_k;
    const int slots_per_rank = static_cast<int>(args.slots_per_rank);
    for (std::int64_t i = begin * top_k + threadIdx.x; i < end * top_k; i += blockDim.x) {
      const std::int64_t token = i / top_k;
      std::int32_t& slot = slot_at(i);
      if (slot < 0) continue;
      const int g = slot / slots_per_rank;
      const int j = __popc(ranks[token - begin] & ((1u << g) - 1));
      if (tiling.visits[2 * (token * tiling.num_destinations + j) + 1] < 0) {
        slot = -1;
      } else {
        atomicAdd(&total[slot], 1);
      }
    }
    __syncthreads();
  }

  /// Gives each choice its place among all of its slot. Each warp ranks a segment of the tile.
  __device__ void place_choices() const {
    const int top_k = tiling.top_k;
    const int num_slots = tiling.num_slots;
    for (int i = threadIdx.x; i < num_segments * num_slots; i += blockDim.x) segments[i] = 0;
    __syncthreads();
    const std::int64_t all = (end - begin) * top_k;
    const std::int64_t length = (all / num_segments / kWarp + 1) * kWarp;
    const bool works = warp_index() < num_segments;
    const std::int64_t first = works ? min(warp_index() * length, all) : all;
    const std::int64_t last = min(first + length, all);
    int* mine = segments + (works ? warp_index() : 0) * num_slots;
    const std::int64_t begin_choice = begin * top_k;
    for (std::int64_t i = first + lane_index(); i < last; i += kWarp) {
      if (const std::int32_t slot = slot_at(begin_choice + i); slot >= 0) atomicAdd(&mine[slot], 1);
    }
    __syncthreads();
    for (int p = threadIdx.x; p < num_slots; p += blockDim.x) {
      int sum = before[p];
      for (int s = 0; s < num_segments; ++s) {
        const int count = segments[s * num_slots + p];
        segments[s * num_slots + p] = sum;
        sum += count;
      }
    }
    __syncthreads();
    for (std::int64_t base = first; base < last; base += kWarp) {
      const std::int64_t i = base + lane_index();
      const std::int32_t slot = i < last ? slot_at(begin_choice + i) : -1;
      const unsigned int same = __match_any_sync(kAllLanes, slot);
      const int place = __popc(same & ((1u << lane_index()) - 1));
      const int found = slot < 0 ? -1 : mine[slot] + place;
      __syncwarp();
      if (slot >= 0 && place == 0) mine[slot] += __popc(same);
      __syncwarp();
      if (i >= last) continue;
      std::int32_t* at = travel(begin + i / top_k) + i % top_k;
      at[0] = slot;
      at[top_k] = found;
    }
  }
};

}  // namespace moetuner::transport
