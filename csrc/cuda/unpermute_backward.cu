// A block takes one token: it reads the gradient once, writes it, weighted, to the token's K rows,
// and dots it with them. The dots are added up in the same order on every run. Rows of no token,
// which two small kernels have found meanwhile, are zeroed in the end.

#include "launch.cuh"
#include "moetuner/ops/unpermute.h"
#include "numeric.cuh"

#include <cuda_runtime.h>

#include <algorithm>

namespace moetuner::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxDotThreads = 128;  // whose many registers leave room for more blocks then
constexpr int kMarkThreads = 256;

/// Lets its successors begin when what the caller has enqueued is complete: all may read that.
__global__ void clear_marks_kernel(const __grid_constant__ UnpermuteBackwardArgs args) {
  wait_for_predecessor();
  let_successor_begin();
  const std::int64_t row = std::int64_t{blockIdx.x} * kMarkThreads + threadIdx.x;
  if (row < args.num_rows) args.owned[row] = 0;
}

__global__ void mark_kernel(const __grid_constant__ UnpermuteBackwardArgs args) {
  let_successor_begin();
  wait_for_predecessor();
  const std::int64_t i = std::int64_t{blockIdx.x} * kMarkThreads + threadIdx.x;
  if (i >= args.num_tokens * args.top_k) return;
  const std::int64_t row = args.row_map[i];
  if (row >= 0 && row < args.num_rows) args.owned[row] = 1;
}

/// Sum of each of `values` over the block; thread i < kBatch gets that of values[i].
template <int kBatch>
__device__ float block_sum(const float (&values)[kBatch]) {
  __shared__ float of_warps[kMaxDotThreads / kWarp][kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    float value = values[i];
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      value += __shfl_xor_sync(kAllLanes, value, step);
    }
    if (lane_index() == 0) of_warps[warp_index()][i] = value;
  }
  __syncthreads();
  float sum = 0.0f;
  if (threadIdx.x < kBatch) {
    for (unsigned int w = 0; w < blockDim.x / kWarp; ++w) sum += of_warps[w][threadIdx.x];
  }
  __syncthreads();
  return sum;
}

/// kBatch: rows at a time; kWidth: columns of a thread; kDots: the weights' gradient too.
template <typename T, typename W, int kWidth, int kBatch, bool kDots>
__global__ void __launch_bounds__(kDots ? kMaxDotThreads : kMaxThreads)
    unpermute_backward_kernel(const __grid_constant__ UnpermuteBackwardArgs args) {
  using Values = Pack<T, kWidth>;
  const std::int64_t token = blockIdx.x;
  const T* grad_out = static_cast<const T*>(args.grad_out) + token * args.hidden;
  const T* rows = static_cast<const T*>(args.rows);
  T* grad_rows = static_cast<T*>(args.grad_rows);
  const W* weights = static_cast<const W*>(args.weights);
  const std::int64_t step = std::int64_t{blockDim.x} * kWidth;

  for (int first = 0; first < args.top_k; first += kBatch) {
    std::int64_t row[kBatch];
    float weight[kBatch];
    float dot[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const bool there = first + i < args.top_k;
      const std::int64_t choice = token * args.top_k + first + i;
      row[i] = there ? args.row_map[choice] : -1;
      if (row[i] >= args.num_rows) row[i] = -1;
      weight[i] = there && weights ? to_float(weights[choice]) : 1.0f;
    }
    for (std::int64_t column = threadIdx.x * kWidth; column < args.hidden; column += step) {
      const Values grad = *reinterpret_cast<const Values*>(grad_out + column);
      Values values[kBatch];
      if constexpr (kDots) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (row[i] >= 0) values[i] = load_once<Values>(rows + row[i] * args.hidden + column);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (row[i] < 0) continue;
        Values scaled;
#pragma unroll
        for (int w = 0; w < kWidth; ++w) {
          const float value = to_float(grad.values[w]);
          scaled.values[w] = from_float<T>(weight[i] * value);
          if constexpr (kDots) dot[i] += value * to_float(values[i].values[w]);
        }
        store_once(grad_rows + row[i] * args.hidden + column, scaled);
      }
    }
    if constexpr (kDots) {
      const float sum = block_sum(dot);
      const int k = first + static_cast<int>(threadIdx.x);
      if (threadIdx.x < kBatch && k < args.top_k) {
        static_cast<W*>(args.grad_weights)[token * args.top_k + k] = from_float<W>(sum);
      }
    }
  }

  wait_for_predecessor();
  let_successor_begin();
  // A row per warp at a time.
  const std::int64_t warps = blockDim.x / kWarp;
  for (std::int64_t row = token + warp_index() * std::int64_t{gridDim.x}; row < args.num_rows;
       row += warps * gridDim.x) {
    if (args.owned[row]) continue;
    for (std::int64_t column = lane_index() * kWidth; column < args.hidden;
         column += kWarp * kWidth) {
      store_once(grad_rows + row * args.hidden + column, Values{});
    }
  }
}

template <typename T, typename W, int kWidth, bool kDots>
void run(const UnpermuteBackwardArgs& args, cudaStream_t stream) {
  const std::int64_t vectors = ceil_div(args.hidden, kWidth);
  const std::int64_t turns = ceil_div(vectors, kDots ? kMaxDotThreads : kMaxThreads);
  const auto threads = static_cast<int>(ceil_div(ceil_div(vectors, turns), kWarp) * kWarp);
  const auto kernel = args.top_k <= 2   ? unpermute_backward_kernel<T, W, kWidth, 2, kDots>
                      : args.top_k <= 4 ? unpermute_backward_kernel<T, W, kWidth, 4, kDots>
                                        : unpermute_backward_kernel<T, W, kWidth, 8, kDots>;
  launch(kernel, {.blocks = args.num_tokens, .threads = threads}, stream, args);
}

}  // namespace

void unpermute_backward(const UnpermuteBackwardArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0 || args.hidden == 0) return;
  const auto per_thread = [](std::int64_t count) {
    return Grid{.blocks = std::max<std::int64_t>(ceil_div(count, kMarkThreads), 1),
                .threads = kMarkThreads};
  };
  launch(clear_marks_kernel, per_thread(args.num_rows), stream, args);
  launch(mark_kernel, per_thread(args.num_tokens * args.top_k), stream, args);
  with_types<__nv_bfloat16, __half>(args, [&]<typename T, typename W>() {
    const bool wide =
        is_multiple(16, args.grad_out, args.rows, args.grad_rows, args.hidden * sizeof(T));
    if (args.grad_weights) {
      wide ? run<T, W, kWide<T>, true>(args, stream) : run<T, W, 1, true>(args, stream);
    } else {
      wide ? run<T, W, kWide<T>, false>(args, stream) : run<T, W, 1, false>(args, stream);
    }
  });
}

}  // namespace moetuner::cuda
