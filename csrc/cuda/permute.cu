// From ids to rows, every row read once and written K times. Few choices take one kernel, in which
// every block counts all of them by itself:
//
//     permute_few    count, place the experts, rank the block's tile, copy its rows
//
// and many take three, each of which begins before the last has ended:
//
//     count          counts[tile, e]: choices of each tile
//     place          rank and row of each choice of a tile
//     copy           all blocks copy rows, the first of which they fetch meanwhile

#include "count_routing.cuh"
#include "launch.cuh"
#include "moetuner/ops/ids.h"
#include "moetuner/ops/permute.h"
#include "place_choices.cuh"
#include "row_copiers.cuh"

#include <cuda_runtime.h>

#include <algorithm>

namespace moetuner::cuda {
namespace {

constexpr int kThreads = 512;
constexpr std::int64_t kFewChoices = 8192;
constexpr int kMinPiece = 2048;    // bytes; rows of few tokens are cut to fill the chip
constexpr int kTiles = 64;         // of many choices; as many counts are summed by every block
constexpr int kPlaceInts = 16384;  // shared memory of the place kernel
constexpr std::int64_t kIntBytes = sizeof(int);
constexpr int kStaticShared = 4096;  // bytes that are enough for what kernels declare

/// The workspace: where each expert's filled rows end, [E], and the tiles' counts, [tiles, E].
template <typename Id>
__device__ std::int32_t* filled_ends(const PermuteArgs<Id>& args) {
  return args.workspace;
}

template <typename Id>
__device__ std::int32_t* tile_counts(const PermuteArgs<Id>& args) {
  return args.workspace + args.num_experts;
}

/// Loads are what has been counted anyway, where ids are experts.
template <typename Id>
__device__ void add_totals(const PermuteArgs<Id>& args, const int* total) {
  if (args.counters.load == nullptr || args.expert_map != nullptr || blockIdx.x != 0) return;
  for (int e = threadIdx.x; e < args.num_experts; e += blockDim.x) {
    if (total[e] > 0) add_to(&args.counters.load[e], total[e]);
  }
}

/// Adds the tokens [first, last), which are this block's, to the other counters; loads of ids that
/// are not experts by one atomic per warp and id.
template <typename Id>
__device__ void count_tokens(const PermuteArgs<Id>& args,
                             std::int64_t first,
                             std::int64_t last,
                             const Warps& warps) {
  const auto& counters = args.counters;
  if (counters.load == nullptr || warps.index < 0) return;
  const std::int64_t end = args.expert_map != nullptr ? last * counters.top_k : 0;
  for (std::int64_t i = first * counters.top_k + warps.index * kWarp; i < end;
       i += warps.count * kWarp) {
    const std::int64_t choice = i + lane_index();
    const std::int32_t id =
        choice < end ? read_id(counters.topk_ids, choice, "permute: topk_ids") : -1;
    const unsigned int same = __match_any_sync(kAllLanes, id);
    const bool speaks = (same & ((1u << lane_index()) - 1)) == 0;
    if (speaks && id >= 0 && id < counters.num_experts) add_to(&counters.load[id], __popc(same));
  }
  if (!counters.coactivation && !counters.transitions) return;
  for (std::int64_t t = first + warps.index; t < last; t += warps.count) {
    count_pairs(counters, t, {"permute: topk_ids", "permute: previous_topk_ids"});
  }
}

/// Copies the scales of the choices [first, last), which are in the map, by this block.
template <typename Id>
__device__ void copy_scales(const PermuteArgs<Id>& args,
                            std::int64_t first,
                            std::int64_t last,
                            const Warps& warps) {
  if (warps.index < 0) return;
  const auto copy = [&]<typename Word>(Word) {
    const std::int64_t words = args.scale_bytes / static_cast<std::int64_t>(sizeof(Word));
    for (std::int64_t i = first + warps.index; i < last; i += warps.count) {
      const std::int64_t row = args.row_map[i];
      if (row < 0) continue;
      const auto* from = static_cast<const Word*>(args.scales) + i / args.top_k * words;
      auto* to = static_cast<Word*>(args.row_scales) + row * words;
      for (std::int64_t w = lane_index(); w < words; w += kWarp) to[w] = from[w];
    }
  };
  const auto address = reinterpret_cast<std::uintptr_t>(args.scales) |
                       reinterpret_cast<std::uintptr_t>(args.row_scales) |
                       static_cast<std::uintptr_t>(args.scale_bytes);
  address % 4 == 0 ? copy(std::uint32_t{}) : copy(std::uint8_t{});
}

/// Block b copies the pieces [T * pieces * b / blocks, T * pieces * (b + 1) / blocks). A token that
/// two blocks share is ranked by both, and owned by the one with its first piece.
template <typename Id, typename Copier>
__global__ void __launch_bounds__(kThreads, 1)
    permute_few_kernel(const __grid_constant__ PermuteArgs<Id> args,
                       const __grid_constant__ RowCopy rows,
                       const Drive drive) {
  extern __shared__ __align__(128) char shared[];  // [ copier ][ total: E ][ next: E ][ tile rows ]
  const int num_experts = static_cast<int>(args.num_experts);
  int* total = reinterpret_cast<int*>(shared + Copier::shared_bytes(rows.piece_bytes, drive));
  int* next = total + num_experts;
  int* tile_rows = next + num_experts;
  const std::int64_t all = args.num_tokens * rows.pieces;
  const std::int64_t first_piece = all * blockIdx.x / gridDim.x;
  const std::int64_t last_piece = all * (blockIdx.x + 1) / gridDim.x;
  const std::int64_t first = first_piece / rows.pieces;
  const std::int64_t owned = (first_piece + rows.pieces - 1) / rows.pieces;
  const std::int64_t last = (last_piece + rows.pieces - 1) / rows.pieces;
  for (int e = threadIdx.x; e < 2 * num_experts; e += kThreads) total[e] = 0;
  __syncthreads();

  wait_for_predecessor();
  let_successor_begin();
  Copier copier(rows, {first_piece + warp_index(), last_piece, drive.drivers}, drive, shared);
  count_all(args, first * args.top_k, total, next);
  __syncthreads();
  add_totals(args, total);
  const std::int64_t end_of_all = place_experts<kThreads>(args, total, next);
  if (warp_index() == 0) {
    const std::int64_t begin = first * args.top_k;
    rank_choices(args, begin, last * args.top_k, next, [&](std::int64_t choice, int row) {
      tile_rows[choice - begin] = row;
      if (choice >= owned * args.top_k) args.row_map[choice] = row;
    });
  }
  __syncthreads();
  copier.copy({tile_rows, first, static_cast<int>(args.top_k)});
  const Warps helpers = warps_from(Copier::kFirstHelper);
  if (args.scales) copy_scales(args, owned * args.top_k, last * args.top_k, helpers);
  count_tokens(args, owned, last, helpers);
  clear_padding(args, total, end_of_all, helpers);
}

/// The choices of a block's tile.
template <typename Id>
__device__ std::int64_t first_choice(const PermuteArgs<Id>& args, std::int64_t block) {
  return args.num_tokens * args.top_k * block / gridDim.x;
}

template <typename Id>
__global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ PermuteArgs<Id> args) {
  extern __shared__ int count[];  // [E]
  const int num_experts = static_cast<int>(args.num_experts);
  for (int e = threadIdx.x; e < num_experts; e += kThreads) count[e] = 0;
  __syncthreads();
  wait_for_predecessor();
  let_successor_begin();
  const std::int64_t last = first_choice(args, blockIdx.x + 1);
#pragma unroll 4
  for (std::int64_t i = first_choice(args, blockIdx.x) + threadIdx.x; i < last; i += kThreads) {
    if (const int expert = expert_of(args, i); expert >= 0) atomicAdd(&count[expert], 1);
  }
  __syncthreads();
  std::int32_t* counts = tile_counts(args) + std::int64_t{blockIdx.x} * num_experts;
  for (int e = threadIdx.x; e < num_experts; e += kThreads) counts[e] = count[e];
}

/// Each warp ranks a segment of the tile, after those that the segments before it hold. Until the
/// tiles are counted it reads only ids.
template <typename Id>
__global__ void __launch_bounds__(kThreads, 2)
    place_kernel(const __grid_constant__ PermuteArgs<Id> args, int segments) {
  extern __shared__ int total[];  // [E], then next: [E], of_segment: [segments, E]
  const int num_experts = static_cast<int>(args.num_experts);
  int* next = total + num_experts;
  int* of_segment = next + num_experts;
  for (int i = threadIdx.x; i < (2 + segments) * num_experts; i += kThreads) total[i] = 0;
  __syncthreads();
  const std::int64_t begin = first_choice(args, blockIdx.x);
  const std::int64_t end = first_choice(args, blockIdx.x + 1);
  const std::int64_t length = ((end - begin) / segments / kWarp + 1) * kWarp;
  const bool ranks = warp_index() < segments;
  const std::int64_t first = begin + warp_index() * length;
  const std::int64_t last = ranks ? min(first + length, end) : first;
  int* mine = of_segment + warp_index() * num_experts;
#pragma unroll 2
  for (std::int64_t i = first + lane_index(); i < last; i += kWarp) {
    if (const int expert = expert_of(args, i); expert >= 0) atomicAdd(&mine[expert], 1);
  }

  wait_for_predecessor();
  let_successor_begin();  // not earlier: its burst of reads would delay the counts
  sum_tiles(tile_counts(args), num_experts, total, next);
  __syncthreads();
  add_totals(args, total);
  place_experts<kThreads>(args, total, next);
  for (int e = threadIdx.x; e < num_experts; e += kThreads) {
    int sum = next[e];
    for (int s = 0; s < segments; ++s) {
      const int count = of_segment[s * num_experts + e];
      of_segment[s * num_experts + e] = sum;
      sum += count;
    }
    if (blockIdx.x == 0) filled_ends(args)[e] = total[e];
  }
  __syncthreads();
  if (!ranks) return;
  rank_choices(
      args, first, last, mine, [&](std::int64_t choice, int row) { args.row_map[choice] = row; });
}

/// The pieces of all tokens, spread over the drivers of all blocks one by one: at any time the chip
/// writes neighbouring rows.
template <typename Id, typename Copier>
__global__ void __launch_bounds__(kThreads, 1)
    copy_kernel(const __grid_constant__ PermuteArgs<Id> args,
                const __grid_constant__ RowCopy rows,
                const Drive drive) {
  extern __shared__ __align__(128) char shared[];
  const std::int64_t driver = blockIdx.x + std::int64_t{warp_index()} * gridDim.x;
  const std::int64_t drivers = std::int64_t{gridDim.x} * drive.drivers;
  Copier copier(rows, {driver, args.num_tokens * rows.pieces, drivers}, drive, shared);
  wait_for_predecessor();
  let_successor_begin();
  copier.copy({args.row_map, 0, static_cast<int>(args.top_k)});
  const std::int64_t first = args.num_tokens * blockIdx.x / gridDim.x;
  const std::int64_t last = args.num_tokens * (blockIdx.x + 1) / gridDim.x;
  const Warps helpers = warps_from(Copier::kFirstHelper);
  if (args.scales) copy_scales(args, first * args.top_k, last * args.top_k, helpers);
  count_tokens(args, first, last, helpers);
  clear_padding(args, filled_ends(args), args.end_offsets[args.num_experts - 1], helpers);
}

bool few(std::int64_t num_choices) { return num_choices <= kFewChoices; }

template <typename Copier, typename Id>
RowCopy cut_rows(const PermuteArgs<Id>& args) {
  const std::int64_t drivers = Device::current().processors * Copier::kMaxDrivers;
  std::int64_t pieces = std::max<std::int64_t>(1, ceil_div(args.row_bytes, Copier::kMaxPiece));
  while (args.num_tokens * pieces < drivers && args.row_bytes / pieces >= 2 * kMinPiece) {
    pieces *= 2;
  }
  const std::int64_t bytes =
      std::max<std::int64_t>(16, ceil_div(ceil_div(args.row_bytes, pieces), 16) * 16);
  return {.from = static_cast<const char*>(args.x),
          .to = static_cast<char*>(args.rows),
          .row_bytes = args.row_bytes,
          .pieces = static_cast<int>(std::max<std::int64_t>(1, ceil_div(args.row_bytes, bytes))),
          .piece_bytes = static_cast<int>(bytes)};
}

/// Launches a kernel that copies rows, with `tables` bytes of its own behind the copier's. Each
/// driver gets as many stages as it has pieces, and the shared memory holds.
template <typename Copier, typename Kernel, typename Id>
void launch_copying(Kernel kernel,
                    std::int64_t blocks,
                    std::int64_t tables,
                    const PermuteArgs<Id>& args,
                    const RowCopy& rows,
                    cudaStream_t stream) {
  const int drivers = std::clamp(Copier::kInFlight / rows.piece_bytes, 1, Copier::kMaxDrivers);
  const std::int64_t of_driver = ceil_div(ceil_div(args.num_tokens * rows.pieces, blocks), drivers);
  Drive drive{drivers,
              static_cast<int>(std::clamp<std::int64_t>(of_driver, 1, Copier::kMaxStages))};
  const std::int64_t room = Device::current().shared_bytes - kStaticShared - tables;
  while (drive.stages > 1 && Copier::shared_bytes(rows.piece_bytes, drive) > room) --drive.stages;
  const std::int64_t shared = Copier::shared_bytes(rows.piece_bytes, drive) + tables;
  launch(kernel,
         {.blocks = blocks, .threads = kThreads, .shared_bytes = shared},
         stream,
         args,
         rows,
         drive);
}

template <typename Copier, typename Id>
void run_few(const PermuteArgs<Id>& args, cudaStream_t stream) {
  const RowCopy rows = cut_rows<Copier>(args);
  const std::int64_t all = args.num_tokens * rows.pieces;
  const std::int64_t blocks = std::clamp<std::int64_t>(all, 1, Device::current().processors);
  const std::int64_t tile_tokens = ceil_div(ceil_div(all, blocks), rows.pieces) + 1;
  const std::int64_t tables = (2 * args.num_experts + tile_tokens * args.top_k) * kIntBytes;
  launch_copying<Copier>(permute_few_kernel<Id, Copier>, blocks, tables, args, rows, stream);
}

template <typename Copier, typename Id>
void run_many(const PermuteArgs<Id>& args, cudaStream_t stream) {
  const std::int64_t table = args.num_experts * kIntBytes;
  const auto segments = static_cast<int>(
      std::clamp<std::int64_t>(kPlaceInts / args.num_experts - 2, 1, kThreads / kWarp));
  launch(count_kernel<Id>,
         {.blocks = kTiles, .threads = kThreads, .shared_bytes = table},
         stream,
         args);
  launch(place_kernel<Id>,
         {.blocks = kTiles, .threads = kThreads, .shared_bytes = (2 + segments) * table},
         stream,
         args,
         segments);
  const std::int64_t blocks = Device::current().processors * Copier::kBlocksPerSm;
  launch_copying<Copier>(copy_kernel<Id, Copier>, blocks, 0, args, cut_rows<Copier>(args), stream);
}

template <typename Copier, typename Id>
void run(const PermuteArgs<Id>& args, cudaStream_t stream) {
  few(args.num_tokens * args.top_k) ? run_few<Copier>(args, stream)
                                    : run_many<Copier>(args, stream);
}

}  // namespace

std::int64_t permute_workspace(std::int64_t num_tokens,
                               std::int64_t top_k,
                               std::int64_t num_experts) {
  return few(num_tokens * top_k) ? 0 : (1 + kTiles) * num_experts;
}

template <typename Id>
void permute(const PermuteArgs<Id>& args, cudaStream_t stream) {
  const bool by_16 = is_multiple(16, args.x, args.rows, args.row_bytes);
  if (by_16 && args.row_bytes > 0 && Device::current().is_hopper) {
    run<BulkCopier>(args, stream);
  } else if (by_16) {
    run<VectorCopier<uint4>>(args, stream);
  } else if (is_multiple(4, args.x, args.rows, args.row_bytes)) {
    run<VectorCopier<std::uint32_t>>(args, stream);
  } else {
    run<VectorCopier<std::uint8_t>>(args, stream);
  }
}

template void permute(const PermuteArgs<std::int32_t>& args, cudaStream_t stream);
template void permute(const PermuteArgs<std::int64_t>& args, cudaStream_t stream);

}  // namespace moetuner::cuda
