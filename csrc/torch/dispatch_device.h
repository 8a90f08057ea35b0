#pragma once

#include "dispatch_forward.h"
#include "moetuner/ops/dispatch.h"
#include "moetuner/ops/permute.h"
#include "peer_exchange.h"

#ifdef MOETUNER_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

// The kernels of a dispatch, on either device.

namespace moetuner {

/// Where the twins run.
struct Cpu {
  static constexpr bool kHasPeers = false;
  static void check_limits(const DispatchInputs&, std::int64_t) {}
  template <typename Id>
  static void route(const RouteArgs<Id>& args) {
    cpu::route(args);
  }
  static void spread(const SpreadArgs& args) { cpu::spread(args); }
  static void unpack(const UnpackArgs& args) { cpu::unpack(args); }
  static void permute(PermuteArgs<std::int32_t> args, const at::Tensor&) { cpu::permute(args); }
};

#ifdef MOETUNER_WITH_CUDA
struct Cuda {
  static constexpr bool kHasPeers = true;
  static void check_limits(const DispatchInputs& in, std::int64_t num_ranks) {
    TORCH_CHECK_VALUE(in.slots_per_rank <= cuda::kMaxPermuteExperts,
                      kDispatchOp,
                      ": slots_per_rank must be at most ",
                      cuda::kMaxPermuteExperts,
                      " on CUDA, got ",
                      in.slots_per_rank);
    TORCH_CHECK_VALUE(num_ranks * (in.slots_per_rank + 3) <= cuda::kMaxRouteSlots,
                      kDispatchOp,
                      ": at most ",
                      cuda::kMaxRouteSlots,
                      " slots, ranks and nodes together on CUDA, got ",
                      num_ranks,
                      " ranks of ",
                      in.slots_per_rank,
                      " slots");
    TORCH_CHECK_VALUE(in.topk_ids.size(1) <= cuda::kMaxPermuteTopK,
                      kDispatchOp,
                      ": topk_ids may have at most ",
                      cuda::kMaxPermuteTopK,
                      " experts per token on CUDA, got ",
                      in.topk_ids.size(1));
  }
  template <typename Id>
  static void route(const RouteArgs<Id>& args) {
    cuda::route(args, c10::cuda::getCurrentCUDAStream());
  }
  static void spread(const SpreadArgs& args) {
    cuda::spread(args, c10::cuda::getCurrentCUDAStream());
  }
  static void unpack(const UnpackArgs& args) {
    cuda::unpack(args, c10::cuda::getCurrentCUDAStream());
  }
  static bool passes_on_over_peers(const DispatchInputs& in, const Sizes& sizes) {
    return moetuner::passes_on_over_peers(in, sizes);
  }
  static void pass_on_over_peers(const DispatchInputs& in,
                                 const Path& path,
                                 const Sizes& sizes,
                                 const at::Tensor& rows,
                                 const at::Tensor& travel,
                                 Dispatched& out) {
    moetuner::pass_on_over_peers(in, path, sizes, rows, travel, out);
  }
  static void permute(PermuteArgs<std::int32_t> args, const at::Tensor& like) {
    at::Tensor workspace;
    const std::int64_t size =
        cuda::permute_workspace(args.num_tokens, args.top_k, args.num_experts);
    if (size > 0) {
      workspace = at::empty({size}, like.options().dtype(at::kInt));
      args.workspace = workspace.mutable_data_ptr<std::int32_t>();
    }
    cuda::permute(args, c10::cuda::getCurrentCUDAStream());
  }
};
#endif

}  // namespace moetuner
