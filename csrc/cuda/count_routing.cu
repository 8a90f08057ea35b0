// One warp per token. Loads are first added up in shared memory, one histogram per block; pairs are
// spread over E x E counters and go to global memory directly.

#include "checked_call.h"
#include "count_routing.cuh"

#include <cuda_runtime.h>

#include <algorithm>

namespace moetuner::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxSharedExperts = 8192;  // 32 KiB of 32-bit counts
constexpr std::int64_t kMaxBlocks = 1024;

template <typename Id>
__global__ void count_routing_kernel(CountRoutingArgs<Id> args, bool shared_load) {
  extern __shared__ unsigned int block_load[];  // [E]
  const std::int64_t num_experts = args.num_experts;
  if (shared_load) {
    for (std::int64_t e = threadIdx.x; e < num_experts; e += blockDim.x) block_load[e] = 0;
    __syncthreads();
  }

  const std::int64_t warps = std::int64_t{gridDim.x} * (blockDim.x / kWarp);
  const std::int64_t first = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;

  for (std::int64_t t = first; t < args.num_tokens; t += warps) {
    for (std::int64_t k = lane_index(); k < args.top_k; k += kWarp) {
      const std::int32_t id = read_id(args.topk_ids, t * args.top_k + k, "count_routing: topk_ids");
      if (id < 0 || id >= num_experts) continue;
      if (shared_load) {
        atomicAdd(&block_load[id], 1u);
      } else {
        add_to(&args.load[id], 1);
      }
    }
    count_pairs(args, t, {"count_routing: topk_ids", "count_routing: previous_topk_ids"});
  }

  if (shared_load) {
    __syncthreads();
    for (std::int64_t e = threadIdx.x; e < num_experts; e += blockDim.x) {
      if (block_load[e]) add_to(&args.load[e], block_load[e]);
    }
  }
}

}  // namespace

template <typename Id>
void count_routing(const CountRoutingArgs<Id>& args, cudaStream_t stream) {
  if (args.num_tokens == 0 || args.num_experts == 0) return;
  const std::int64_t needed = ceil_div(args.num_tokens, kThreads / kWarp);
  const auto blocks = static_cast<unsigned int>(std::min(needed, kMaxBlocks));
  // A block's 32-bit counts cannot overflow: it sees at most tokens * K / blocks ids.
  const bool fits = args.num_tokens / blocks < (std::int64_t{1} << 31) / args.top_k;
  const bool shared_load = fits && args.num_experts <= kMaxSharedExperts;
  const std::size_t bytes =
      shared_load ? static_cast<std::size_t>(args.num_experts) * sizeof(unsigned int) : 0;
  count_routing_kernel<<<blocks, kThreads, bytes, stream>>>(args, shared_load);
  MOETUNER_CUDA_CHECK(cudaGetLastError());
}

template void count_routing(const CountRoutingArgs<std::int32_t>& args, cudaStream_t stream);
template void count_routing(const CountRoutingArgs<std::int64_t>& args, cudaStream_t stream);

}  // namespace moetuner::cuda
