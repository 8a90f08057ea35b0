// A dispatch between ranks that map each other's memory, in two kernels:
//
//     route_and_send   tiles of tokens are routed by a block each; the last block tells the peers
//                      how many rows and choices come to them, and adds up what comes here; some
//                      blocks then send rows
//     spread           begins as soon as the blocks of the first are at work: carries own rows, and
//                      those of peers as they arrive, to the rows of their experts
//
// Where sizes are exact, the host reads how many rows there are, before the second where it has no
// guess of them, and else after it; rows are on their way meanwhile.

#include "arrived_rows.cuh"
#include "carry_rows.cuh"
#include "meet_peers.cuh"
#include "peer_waits.cuh"
#include "route_tiles.cuh"
#include "send_rows.cuh"

#include <cuda_runtime.h>

#include <algorithm>

namespace moetuner::transport {
namespace {

constexpr int kSenders = 24;  // that fill an NVLink of an H200; more only take blocks away
constexpr std::int64_t kChoicesOfTile = 512;
constexpr std::int64_t kChoicesAlone = 1024;  // of a single tile
constexpr std::int64_t kSegmentInts = 8192;   // shared memory of the segments of a tile
constexpr std::int64_t kIntBytes = sizeof(int);

/// Whether all tiles' tokens have their places. The whole block calls it.
__device__ bool ranked(const Peers& peers, const PeerView& view, int num_tiles) {
  const int tile = static_cast<int>(threadIdx.x);
  const bool ok =
      tile >= num_tiles || view.wait_for(Wait::kBlocks, view.rank(), &peers.control->ranked[tile]);
  return __syncthreads_and(ok);
}

template <typename Id, typename Ring>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    route_and_send_kernel(const __grid_constant__ DispatchArgs<Id> args,
                          const __grid_constant__ Peers peers,
                          const Carry carry,
                          const int num_tiles,
                          const int num_segments) {
  extern __shared__ __align__(128) char shared[];  // [ rows on their way ][ tables ]
  __shared__ std::int64_t first_sent[kMaxPeers + 1];
  __shared__ bool fits;
  const Tiling tiling(args, peers.num_ranks, num_tiles);
  const int block = static_cast<int>(blockIdx.x);
  const bool meets = block == static_cast<int>(gridDim.x) - 1;
  const bool sends = block < args.senders;

  wait_for_predecessor();
  if (meets && threadIdx.x == 0 && args.overflow && !args.adds_overflow) *args.overflow = 0;
  const PeerView view(peers, next_epoch(peers));
  if (threadIdx.x == 0) let_successor_begin();  // which reads the epoch that this thread has set
  if (__syncthreads_or(view.aborted())) return;
  Sender<Ring> sender(view,
                      static_cast<const char*>(args.x),
                      args.row_bytes,
                      sending_turns(args.num_tokens, args.senders, carry),
                      carry,
                      shared);
  if (sends) sender.read_ahead();
  // A single tile is routed by every block for itself, which takes less time than to wait for it.
  const bool alone = num_tiles == 1;
  const int own_tile = alone ? 0 : meets ? num_tiles : block;
  int* tables = reinterpret_cast<int*>(shared + carry.shared_bytes());
  Tile<Id> tile(args, tiling, peers, own_tile, tables, num_segments);
  const bool routes = own_tile < num_tiles;
  if (routes) tile.count();
  if (alone) {
    tile.begin_at_zero();
  } else {
    if (routes) tile.publish(tiling.counts, block, tiling.columns);
    if (!wait_for_blocks(peers, view)) return sender.abandon();
    tile.add_up(tiling.counts, own_tile, tiling.columns);
  }
  first_rows(tile.total + tiling.num_slots, args.capacity, peers.num_ranks, first_sent);
  if (threadIdx.x == 0) {
    fits = true;
    for (int g = 0; g < peers.num_ranks; ++g) {
      if (args.capacity == 0 && tile.total[tiling.num_slots + g] > peers.layout.shape.num_rows) {
        fits = false;
      }
    }
  }
  __syncthreads();
  const bool drops = args.capacity > 0 && args.capacity < args.num_tokens;
  if (meets && !drops) {
    meet_peers(args, peers, tiling, view, tile.total, tile.segments);
    return count_tokens(args, tiling, tile.total);
  }
  if (meets) count_tokens(args, tiling, tile.total);
  if (routes) tile.place_rows(first_sent);
  if (drops) {
    if (routes) tile.drop_choices();
    if (!alone) {
      if (routes) tile.publish(tiling.kept_counts, block, tiling.num_slots);
      if (!wait_for_blocks(peers, view)) return sender.abandon();
      tile.add_up(tiling.kept_counts, own_tile, tiling.num_slots);
    }
  }
  if (meets) return meet_peers(args, peers, tiling, view, tile.total, tile.segments);
  if (routes) tile.place_choices();
  __syncthreads();
  if (block < num_tiles && threadIdx.x == 0) {
    store_release_here(&peers.control->ranked[block], view.epoch());
  }
  if (!sends) return;
  if ((!alone && !ranked(peers, view, num_tiles)) || !fits) return sender.abandon();
  const int note_ints = 3 * tiling.top_k;
  sender.send(
      tiling.num_destinations,
      note_ints,
      [&](std::int64_t token, int j) {
        const auto* visit =
            reinterpret_cast<const int2*>(tiling.visits) + token * tiling.num_destinations + j;
        const int2 value = __ldcg(visit);
        return Visit{value.x, value.y};
      },
      [&](std::int64_t token) { return tiling.travel + token * note_ints; });
}

/// Whether all that comes fits in here, and into the windows. Where it does not, nobody may wait
/// for rows, and the host enqueues this again.
template <typename Id>
__device__ bool has_room(const DispatchArgs<Id>& args,
                         const Peers& peers,
                         const Tiling& tiling,
                         std::int64_t num_lines) {
  if (args.capacity > 0) return true;
  const std::int64_t largest = __ldcg(tiling.received + tiling.num_ranks);
  const std::int64_t num_choices = __ldcg(tiling.received + tiling.num_ranks + 1);
  return largest <= peers.layout.shape.num_rows && num_choices <= args.max_rows &&
         num_lines <= args.max_lines;
}

/// In the fixed form, the lines of rows that did not come: no choice is here.
template <typename Id>
__device__ void clear_lines(const DispatchArgs<Id>& args, const Arrivals& arrivals, int num_ranks) {
  if (args.capacity == 0) return;
  const std::int64_t top_k = args.top_k;
  for (int s = 0; s < num_ranks; ++s) {
    const std::int64_t begin = (arrivals.first[s] + arrivals.counts[s]) * top_k;
    const std::int64_t end = arrivals.first[s + 1] * top_k;
    for (std::int64_t i = begin + std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < end;
         i += std::int64_t{gridDim.x} * kThreads) {
      args.recv_map[i] = kNoRow;
      args.recv_weights[i] = 0.0f;
    }
  }
}

template <typename Id, typename Ring>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    spread_kernel(const __grid_constant__ DispatchArgs<Id> args,
                  const __grid_constant__ Peers peers,
                  const Carry carry,
                  const int num_tiles) {
  extern __shared__ __align__(128) char shared[];
  __shared__ std::int32_t counts[kMaxPeers];
  __shared__ std::int64_t first[kMaxPeers + 1];
  __shared__ bool placed;
  const Tiling tiling(args, peers.num_ranks, num_tiles);
  const PeerView view(peers, this_epoch(peers));
  const int num_ranks = peers.num_ranks;
  if (!ranked(peers, view, num_tiles)) return wait_for_predecessor();
  if (threadIdx.x == 0) {
    placed = view.wait_for(Wait::kBlocks, view.rank(), &peers.control->placed);
  }
  __syncthreads();
  if (!placed) return wait_for_predecessor();
  if (static_cast<int>(threadIdx.x) < num_ranks) {
    counts[threadIdx.x] = __ldcg(tiling.received + threadIdx.x);
  }
  __syncthreads();
  first_rows(counts, args.capacity, num_ranks, first);
  __syncthreads();
  if (!has_room(args, peers, tiling, first[num_ranks])) return wait_for_predecessor();
  const Arrivals arrivals{counts, first};
  Spreader<Ring> spreader(view, arrivals, 0, carry, shared);
  const int slots = static_cast<int>(args.slots_per_rank);
  const int first_slot = view.rank() * slots;
  const int top_k = tiling.top_k;
  const std::int32_t* bases = bases_of(peers);
  const auto own_token = [&](std::int64_t i) {
    return static_cast<std::int64_t>(__ldcg(tiling.own_tokens + i));
  };
  const auto row_at = [&](std::int64_t row) {
    return row >= 0 ? static_cast<char*>(args.rows) + row * args.row_bytes : nullptr;
  };
  char* to = nullptr;  // of the row that is carried, for this lane's choice
  spreader.spread(
      [&](std::int64_t i) {
        return static_cast<const char*>(args.x) + own_token(i) * args.row_bytes;
      },
      [&](Ring& ring, const Arrival& arrival, int piece) {
        const std::int64_t line = (first[arrival.sender] + arrival.index) * top_k;
        if (piece == 0) {
          const std::int32_t* note = arrival.sender == view.rank()
                                         ? tiling.travel + own_token(arrival.index) * 3 * top_k
                                         : view.note(view.rank(), arrival.sender, arrival.index);
          for (int k = lane_index(); k < top_k; k += kWarp) {
            const int slot = __ldcg(note + k) - first_slot;
            const int place = __ldcg(note + top_k + k);
            const int weight = __ldcg(note + 2 * top_k + k);
            const bool here = slot >= 0 && slot < slots;
            std::int64_t row = -1;
            if (here) row = std::int64_t{__ldcg(bases + arrival.sender * slots + slot)} + place;
            if (row >= args.max_rows) row = -1;
            args.recv_map[line + k] = static_cast<std::int32_t>(row);
            args.recv_weights[line + k] = here ? __int_as_float(weight) : 0.0f;
            if (k == lane_index()) to = row_at(row);
          }
        }
        ring.await();
        ring.write(to, piece);
        for (int begin = kWarp; begin < top_k; begin += kWarp) {  // by the map that is there now
          const int k = begin + lane_index();
          ring.write(k < top_k ? row_at(args.recv_map[line + k]) : nullptr, piece);
        }
      });
  clear_lines(args, arrivals, num_ranks);
  wait_for_predecessor();  // rows are sent: they may change, and the next operation may begin
}

/// Sizes of the launches of one dispatch.
struct Launches {
  int num_tiles, num_segments, senders;
  Carry carry;
  std::int64_t route_blocks, spread_blocks, tables;
};

template <typename Id>
Launches plan(const DispatchArgs<Id>& args, const Peers& peers) {
  const Room room(peers);
  Launches out{};
  const std::int64_t all = room.blocks;
  const std::int64_t for_route = std::max<std::int64_t>(all * 2 / 5, 2);
  const std::int64_t most_senders = std::max<std::int64_t>(for_route - 1, 1);
  out.senders = peers.num_ranks == 1
                    ? 0
                    : static_cast<int>(std::clamp<std::int64_t>(
                          args.senders > 0 ? args.senders : kSenders, 1, most_senders));
  const std::int64_t choices = args.num_tokens * args.top_k;
  out.num_tiles = choices <= kChoicesAlone ? 1
                                           : static_cast<int>(std::clamp<std::int64_t>(
                                                 ceil_div(choices, kChoicesOfTile),
                                                 1,
                                                 std::min<std::int64_t>(most_senders, kMaxTiles)));
  out.route_blocks = std::max(out.num_tiles, out.senders) + 1;
  out.spread_blocks =
      std::max<std::int64_t>(peers.sharing > 1 ? all - for_route : all - out.senders, 1);
  const Tiling tiling(args, peers.num_ranks, out.num_tiles);
  out.num_segments = static_cast<int>(
      std::clamp<std::int64_t>(kSegmentInts / tiling.num_slots, 1, kThreads / kWarp));
  // The last block keeps the counts of all ranks where others keep their segments.
  const std::int64_t counts = peers.num_ranks * (args.slots_per_rank + WindowLayout::kCountHead);
  out.tables = (2 * tiling.columns + 2 * kTileChoices +
                std::max<std::int64_t>(counts, out.num_segments * tiling.num_slots)) *
               kIntBytes;
  out.carry = carry_rows(args.row_bytes, room.shared_bytes - out.tables);
  return out;
}

template <typename Ring, typename Id>
void run_route(DispatchArgs<Id> args, const Peers& peers, Launches sizes, cudaStream_t stream) {
  if (!Ring::kEngine) sizes.carry = carry_words(args.row_bytes);
  args.senders = sizes.senders;
  launch(route_and_send_kernel<Id, Ring>,
         {.blocks = sizes.route_blocks,
          .threads = kThreads,
          .shared_bytes = sizes.carry.shared_bytes() + sizes.tables},
         stream,
         args,
         peers,
         sizes.carry,
         sizes.num_tiles,
         sizes.num_segments);
}

template <typename Ring, typename Id>
void run_spread(DispatchArgs<Id> args, const Peers& peers, Launches sizes, cudaStream_t stream) {
  if (!Ring::kEngine) sizes.carry = carry_words(args.row_bytes);
  launch(spread_kernel<Id, Ring>,
         {.blocks = sizes.spread_blocks,
          .threads = kThreads,
          .shared_bytes = sizes.carry.shared_bytes()},
         stream,
         args,
         peers,
         sizes.carry,
         sizes.num_tiles);
}

}  // namespace

namespace cuda {

std::int64_t dispatch_workspace(std::int64_t num_tokens,
                                std::int64_t top_k,
                                std::int64_t num_ranks,
                                std::int64_t slots_per_rank) {
  const std::int64_t columns = num_ranks * (slots_per_rank + 2);
  return num_tokens * (3 * top_k + 2 * std::min(top_k, num_ranks) + 2) + 2 * kMaxTiles * columns +
         num_ranks + 2;
}

template <typename Id>
void route_and_send(const DispatchArgs<Id>& args, const Peers& peers, cudaStream_t stream) {
  const Launches sizes = plan(args, peers);
  with_ring(args.x, nullptr, sizes.carry, [&]<typename Ring>() {
    run_route<Ring>(args, peers, sizes, stream);
  });
}

template <typename Id>
void spread(const DispatchArgs<Id>& args, const Peers& peers, cudaStream_t stream) {
  const Launches sizes = plan(args, peers);
  with_ring(args.x, args.rows, sizes.carry, [&]<typename Ring>() {
    run_spread<Ring>(args, peers, sizes, stream);
  });
}

template void route_and_send(const DispatchArgs<std::int32_t>&, const Peers&, cudaStream_t);
template void route_and_send(const DispatchArgs<std::int64_t>&, const Peers&, cudaStream_t);
template void spread(const DispatchArgs<std::int32_t>&, const Peers&, cudaStream_t);
template void spread(const DispatchArgs<std::int64_t>&, const Peers&, cudaStream_t);

}  // namespace cuda
}  // namespace moetuner::transport
