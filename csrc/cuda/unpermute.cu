// A block sums one stretch of one token's columns: each thread reads the same columns of the
// token's K rows, all loads in flight together, and adds them up in the order of k.

#include "launch.cuh"
#include "moetuner/ops/unpermute.h"
#include "numeric.cuh"

#include <cuda_runtime.h>

namespace moetuner::cuda {
namespace {

constexpr int kMaxThreads = 128;
constexpr int kMinBlocks = 7;  // of a processor at a time, whose registers are cut for that

/// kBatch: rows that a thread has in flight; kWidth: columns of a thread.
template <typename T, typename W, int kWidth, int kBatch>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    unpermute_kernel(const __grid_constant__ UnpermuteArgs args, int stretches) {
  using Values = Pack<T, kWidth>;
  const std::int64_t token = blockIdx.x / stretches;
  const std::int64_t stretch = blockIdx.x % stretches;
  const std::int64_t column = (stretch * blockDim.x + threadIdx.x) * kWidth;
  wait_for_predecessor();
  let_successor_begin();
  if (column >= args.hidden) return;
  const T* rows = static_cast<const T*>(args.rows) + column;
  const std::int32_t* map = args.row_map + token * args.top_k;
  const W* weights =
      args.weights ? static_cast<const W*>(args.weights) + token * args.top_k : nullptr;
  const int top_k = static_cast<int>(args.top_k);

  float sum[kWidth] = {};
  for (int first = 0; first < top_k; first += kBatch) {
    std::int32_t row[kBatch];
    float weight[kBatch];
    Values values[kBatch];
    const auto load_weights = [&] {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        weight[i] = weights && first + i < top_k ? to_float(weights[first + i]) : 1.0f;
      }
    };
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      row[i] = first + i < top_k ? map[first + i] : -1;
      if (row[i] >= args.num_rows) row[i] = -1;
    }
    // Beside the map, whose latency they share; of two rows alone that is late enough afterwards.
    if constexpr (kBatch > 2) load_weights();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      values[i] = row[i] < 0 ? Values{} : load_once<Values>(rows + row[i] * args.hidden);
    }
    if constexpr (kBatch <= 2) load_weights();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (row[i] < 0) weight[i] = 0.0f;
#pragma unroll
      for (int w = 0; w < kWidth; ++w) sum[w] += weight[i] * to_float(values[i].values[w]);
    }
  }

  Values result;
#pragma unroll
  for (int w = 0; w < kWidth; ++w) result.values[w] = from_float<T>(sum[w]);
  store_once(static_cast<T*>(args.out) + token * args.hidden + column, result);
}

template <typename T, typename W, int kWidth>
void run(const UnpermuteArgs& args, cudaStream_t stream) {
  // Even stretches of at most kMaxThreads threads.
  const std::int64_t vectors = ceil_div(args.hidden, kWidth);
  const std::int64_t wanted = ceil_div(vectors, ceil_div(vectors, kMaxThreads));
  const auto threads = static_cast<int>(ceil_div(wanted, kWarp) * kWarp);
  const auto stretches = static_cast<int>(ceil_div(vectors, threads));
  const auto kernel = args.top_k <= 2   ? unpermute_kernel<T, W, kWidth, 2>
                      : args.top_k <= 4 ? unpermute_kernel<T, W, kWidth, 4>
                      : args.top_k <= 6 ? unpermute_kernel<T, W, kWidth, 6>
                                        : unpermute_kernel<T, W, kWidth, 8>;
  const Grid grid{.blocks = args.num_tokens * stretches, .threads = threads};
  launch(kernel, grid, stream, args, stretches);
}

}  // namespace

void unpermute(const UnpermuteArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0 || args.hidden == 0) return;
  with_types<__nv_bfloat16, __half>(args, [&]<typename T, typename W>() {
    const bool wide = is_multiple(16, args.rows, args.out, args.hidden * sizeof(T));
    wide ? run<T, W, kWide<T>>(args, stream) : run<T, W, 1>(args, stream);
  });
}

}  // namespace moetuner::cuda
