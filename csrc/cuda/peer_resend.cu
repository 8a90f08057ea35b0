// Rows to peers by the maps of an earlier dispatch: some blocks send, the others carry what arrives
// to its lines, in one kernel.

#include "arrived_rows.cuh"
#include "carry_rows.cuh"
#include "moetuner/transport/exchange.h"
#include "peer_waits.cuh"
#include "send_rows.cuh"

#include <cuda_runtime.h>

#include <algorithm>

namespace moetuner::transport {
namespace {

constexpr int kSenders = 24;

template <typename Ring>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    resend_kernel(const __grid_constant__ ResendArgs args,
                  const __grid_constant__ Peers peers,
                  const Carry carry) {
  extern __shared__ __align__(128) char shared[];
  __shared__ std::int32_t counts[kMaxPeers];
  __shared__ std::int64_t first_sent[kMaxPeers + 1];
  __shared__ std::int64_t first_received[kMaxPeers + 1];
  const int num_ranks = peers.num_ranks;
  const int g = static_cast<int>(threadIdx.x);

  wait_for_predecessor();
  const PeerView view(peers, next_epoch(peers));
  if (__syncthreads_or(view.aborted())) return;
  if (blockIdx.x == 0) begin_operation(view);
  if (g < num_ranks) counts[g] = args.shares.received[g];
  first_rows(args.shares.sent, 0, num_ranks, first_sent);
  first_rows(args.shares.received, 0, num_ranks, first_received);
  __syncthreads();
  const auto* x = static_cast<const char*>(args.x);
  const auto visit_of = [&](std::int64_t token, int j) {
    if (j >= args.num_destinations) return Visit{-1, -1};
    return visit_of_row(args.send_map[token * args.num_destinations + j], first_sent, num_ranks);
  };
  if (static_cast<int>(blockIdx.x) < args.senders) {
    const Turns turns = sending_turns(args.num_tokens, args.senders, carry);
    Sender<Ring> sender(view, x, args.row_bytes, turns, carry, shared);
    sender.read_ahead();
    sender.send(static_cast<int>(args.num_destinations), 0, visit_of, [](std::int64_t) {
      return static_cast<const std::int32_t*>(nullptr);
    });
  } else {
    // Own rows are read by token, whether it has one here or not: no list says which do.
    if (g == 0) counts[view.rank()] = static_cast<std::int32_t>(args.num_tokens);
    __syncthreads();
    const Arrivals arrivals{counts, first_received, args.lines, args.top_k};
    Spreader<Ring> spreader(view, arrivals, args.senders, carry, shared);
    spreader.spread([&](std::int64_t token) { return x + token * args.row_bytes; },
                    [&](Ring& ring, const Arrival& arrival, int piece) {
                      std::int64_t line = first_received[arrival.sender] + arrival.index;
                      bool writes = lane_index() == 0;
                      if (arrival.sender == view.rank()) {
                        const Visit visit = visit_of(arrival.index, lane_index());
                        writes = visit.rank == view.rank();
                        line = first_received[view.rank()] + visit.row;
                      }
                      ring.await();
                      char* to = static_cast<char*>(args.received) + line * args.row_bytes;
                      ring.write(writes ? to : nullptr, piece);
                    });
  }
  if (blockIdx.x == 0) end_operation(view);
}

template <typename Ring>
void run(ResendArgs args, const Peers& peers, Carry carry, cudaStream_t stream) {
  if (!Ring::kEngine) carry = carry_words(args.row_bytes);
  const std::int64_t blocks = Room(peers).blocks;
  args.senders = peers.num_ranks == 1 ? 0
                                      : std::clamp<int>(args.senders > 0 ? args.senders : kSenders,
                                                        1,
                                                        static_cast<int>(blocks * 2 / 3));
  launch(resend_kernel<Ring>,
         {.blocks = std::max<std::int64_t>(blocks, args.senders + 1),
          .threads = kThreads,
          .shared_bytes = carry.shared_bytes()},
         stream,
         args,
         peers,
         carry);
}

}  // namespace

namespace cuda {

void resend(const ResendArgs& args, const Peers& peers, cudaStream_t stream) {
  const Carry carry = carry_rows(args.row_bytes, Room(peers).shared_bytes);
  with_ring(args.x, args.received, carry, [&]<typename Ring>() {
    run<Ring>(args, peers, carry, stream);
  });
}

}  // namespace cuda
}  // namespace moetuner::transport
