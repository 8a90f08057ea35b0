// One warp per token. Lane i of a warp owns the i-th pair of the token's table:
//
//     pairs of a token:  [ load: K ][ coactivation: K x K ][ transitions: J x K ]
//
// Loads are first added up in shared memory, one histogram per block; pairs are spread over E x E
// counters and go to global memory directly.

#include "checked_call.h"
#include "moetuner/count_routing.h"

#include <cuda_runtime.h>

#include <algorithm>

namespace moetuner::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr std::int64_t kMaxSharedExperts = 8192;  // 32 KiB of 32-bit counts
constexpr std::int64_t kMaxBlocks = 1024;

__device__ void add_one(std::int64_t* counter) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), 1ULL);
}

template <typename Id>
__global__ void count_routing_kernel(CountRoutingArgs<Id> args, bool shared_load) {
  extern __shared__ unsigned int block_load[];  // [E]
  const std::int64_t num_experts = args.num_experts;
  if (shared_load) {
    for (std::int64_t e = threadIdx.x; e < num_experts; e += blockDim.x) block_load[e] = 0;
    __syncthreads();
  }

  const std::int64_t num_coactivation = args.coactivation ? args.top_k * args.top_k : 0;
  const std::int64_t num_transitions = args.transitions ? args.previous_top_k * args.top_k : 0;
  const std::int64_t num_pairs = args.top_k + num_coactivation + num_transitions;
  const std::int64_t warps = std::int64_t{gridDim.x} * (blockDim.x / kWarp);
  const std::int64_t first = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;
  const auto valid = [&](Id id) { return id >= 0 && id < num_experts; };

  for (std::int64_t t = first; t < args.num_tokens; t += warps) {
    const Id* here = args.topk_ids + t * args.top_k;
    for (std::int64_t i = threadIdx.x % kWarp; i < num_pairs; i += kWarp) {
      if (i < args.top_k) {
        if (!valid(here[i])) continue;
        if (shared_load) {
          atomicAdd(&block_load[here[i]], 1u);
        } else {
          add_one(&args.load[here[i]]);
        }
      } else if (i < args.top_k + num_coactivation) {
        const std::int64_t pair = i - args.top_k;
        const Id a = here[pair / args.top_k];
        const Id b = here[pair % args.top_k];
        if (valid(a) && valid(b)) add_one(&args.coactivation[a * num_experts + b]);
      } else {
        const std::int64_t pair = i - args.top_k - num_coactivation;
        const Id a = args.previous_topk_ids[t * args.previous_top_k + pair / args.top_k];
        const Id b = here[pair % args.top_k];
        if (valid(a) && valid(b)) add_one(&args.transitions[a * num_experts + b]);
      }
    }
  }

  if (shared_load) {
    __syncthreads();
    for (std::int64_t e = threadIdx.x; e < num_experts; e += blockDim.x) {
      const unsigned long long count = block_load[e];
      if (count) atomicAdd(reinterpret_cast<unsigned long long*>(&args.load[e]), count);
    }
  }
}

}  // namespace

template <typename Id>
void count_routing(const CountRoutingArgs<Id>& args, cudaStream_t stream) {
  if (args.num_tokens == 0 || args.num_experts == 0) return;
  const std::int64_t needed = (args.num_tokens * kWarp + kThreads - 1) / kThreads;
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
