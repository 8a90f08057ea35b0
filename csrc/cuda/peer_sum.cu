// The way back between ranks that map each other's memory, in one kernel. Some blocks add up the
// rows here of each token of a peer and store the sum into the window of its home; the others do
// the same for own tokens, wait for what peers have stored, and add that up.
//
// Some warps side by side, a *team*, take a token's row, some columns each: many for few tokens,
// one for many.

#include "arrived_rows.cuh"
#include "carry_rows.cuh"
#include "moetuner/transport/exchange.h"
#include "peer_waits.cuh"
#include "sum_lines.cuh"
#include "sum_ring.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

namespace moetuner::transport {
namespace {

constexpr std::int64_t kSenders = 32;  // enough for an NVLink of an H200

/// Who adds up by registers.
template <typename T, int kWidth>
struct ByRegisters {
  using Element = T;
  static constexpr int kWarps = kSumWarps;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr std::int64_t kShared = 0;

  __device__ explicit ByRegisters(char*) {}
  __device__ void send(const SumArgs& args,
                       const PeerView& view,
                       const Arrivals& arrivals,
                       int team) {
    send_sums<T, kWidth>(args, view, arrivals, team);
  }
  __device__ void add_up(const SumArgs& args,
                         const PeerView& view,
                         const std::int64_t* first_sent,
                         const std::int64_t* first_received,
                         int first_home,
                         int team) {
    add_up_homes<T, kWidth>(args, view, first_sent, first_received, first_home, team);
  }
};

template <typename Way>
__global__ void __launch_bounds__(Way::kThreads, 1) sum_kernel(const __grid_constant__ SumArgs args,
                                                               const __grid_constant__ Peers peers,
                                                               const int first_home,
                                                               const Teams teams) {
  extern __shared__ __align__(128) char shared[];
  __shared__ std::int32_t counts[kMaxPeers];
  __shared__ std::int64_t first_sent[kMaxPeers + 1];
  __shared__ std::int64_t first_received[kMaxPeers + 1];
  const int num_ranks = peers.num_ranks;
  const int g = static_cast<int>(threadIdx.x);

  Way way(shared);
  wait_for_predecessor();
  const PeerView view(peers, next_epoch(peers));
  if (__syncthreads_or(view.aborted())) return;
  if (blockIdx.x == 0) begin_operation(view);
  if (g < num_ranks) counts[g] = g == view.rank() ? 0 : args.shares.received[g];
  first_rows(args.shares.sent, 0, num_ranks, first_sent);
  first_rows(args.shares.received, 0, num_ranks, first_received);
  __syncthreads();
  if (static_cast<int>(blockIdx.x) < args.senders) {
    const Arrivals arrivals{counts, first_received, args.lines, args.lines_top_k};
    way.send(args, view, arrivals, teams.of_senders);
  }
  if (static_cast<int>(blockIdx.x) >= first_home) {
    way.add_up(args, view, first_sent, first_received, first_home, teams.of_homes);
  }
  if (blockIdx.x == 0) end_operation(view);
}

/// Warps for each row, so that the warps of `blocks` all have something to do.
int team_of(std::int64_t rows, std::int64_t blocks, int warps_of_block) {
  int warps = warps_of_block;
  while (warps > 1 && rows * warps > blocks * warps_of_block) warps /= 2;
  return warps;
}

template <typename Way>
void run(SumArgs args, const Peers& peers, cudaStream_t stream) {
  const Room room(peers);
  const std::int64_t blocks = std::max<std::int64_t>(
      peers.sharing > 1 ? room.blocks / kBlocksPerProcessor : room.blocks, 2);
  // Ranks that share a device have no link to fill: every block sends first, then adds up.
  const bool apart = peers.sharing == 1 && peers.num_ranks > 1;
  int first_home = 0;
  if (apart) {
    // Few rows do not fill the link: half of the blocks send them, for the sake of time.
    const std::int64_t most = args.num_tokens <= 4 * blocks ? blocks / 2 : 0;
    args.senders = static_cast<int>(std::clamp<std::int64_t>(
        args.senders > 0 ? args.senders : std::max(most, std::min(kSenders, blocks * 2 / 5)),
        1,
        blocks - 1));
    first_home = args.senders;
  } else {
    args.senders = peers.num_ranks > 1 ? static_cast<int>(blocks) : 0;
  }
  const std::int64_t sent = args.num_tokens * std::max<std::int64_t>(args.num_destinations - 1, 1);
  const Teams teams{team_of(sent, std::max(args.senders, 1), Way::kWarps),
                    team_of(args.num_tokens, blocks - first_home, Way::kWarps)};
  launch(sum_kernel<Way>,
         {.blocks = blocks, .threads = Way::kThreads, .shared_bytes = Way::kShared},
         stream,
         args,
         peers,
         first_home,
         teams);
}

template <typename T>
void run_type(const SumArgs& args, const Peers& peers, cudaStream_t stream) {
  const bool wide = is_multiple(16, args.rows, args.out, args.hidden * sizeof(T));
  const std::int64_t rows = args.top_k + args.num_destinations - 1;
  if (wide && args.hidden > 0 && rows <= SumRing<T>::kMostRows && Device::current().is_hopper) {
    run<SumRing<T>>(args, peers, stream);
  } else if (wide) {
    run<ByRegisters<T, kWide<T>>>(args, peers, stream);
  } else {
    run<ByRegisters<T, 1>>(args, peers, stream);
  }
}

}  // namespace

namespace cuda {

void sum(const SumArgs& args, const Peers& peers, cudaStream_t stream) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return run_type<float>(args, peers, stream);
    case Dtype::kBFloat16:
      return run_type<__nv_bfloat16>(args, peers, stream);
    case Dtype::kFloat16:
      return run_type<__half>(args, peers, stream);
  }
}

}  // namespace cuda
}  // namespace moetuner::transport
