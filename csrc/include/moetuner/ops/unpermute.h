#pragma once

#include "moetuner/ops/dtype.h"

#include <cstdint>

struct CUstream_st;  // cudaStream_t, without needing CUDA's headers

namespace moetuner {

/// Sums each token's rows, times its weights: the way back from `permute`.
///
///     out[t] = sum over k = 0 .. K-1 of weights[t, k] * rows[row_map[t, k]]
///
/// T tokens, K experts per token, R rows, H hidden. Products and sums are float32, in the order of
/// k. Entries of `row_map` outside [0, R) are left out.
struct UnpermuteArgs {
  const void* rows;             // [R, H]
  const std::int32_t* row_map;  // [T, K]
  const void* weights;          // [T, K]; null: all one
  void* out;                    // [T, H]
  Dtype dtype;                  // of rows and out
  Dtype weight_dtype;           // float32, or as `dtype`
  std::int64_t num_tokens;
  std::int64_t top_k;
  std::int64_t num_rows;
  std::int64_t hidden;
};

/// Gradients of `unpermute`:
///
///     grad_rows[row_map[t, k]] = weights[t, k] * grad_out[t]        (rows of no token: zero)
///     grad_weights[t, k]       = <grad_out[t], rows[row_map[t, k]]>
///
/// A row belongs to one choice at most, as `permute` makes it.
struct UnpermuteBackwardArgs {
  const void* grad_out;         // [T, H]
  const void* rows;             // [R, H]; null without grad_weights
  const std::int32_t* row_map;  // [T, K]
  const void* weights;          // [T, K]; null: all one
  void* grad_rows;              // [R, H]
  void* grad_weights;           // [T, K] of weight_dtype; null: not wanted
  std::uint8_t* owned;          // cuda only: [R], workspace that marks the rows of tokens
  Dtype dtype;
  Dtype weight_dtype;
  std::int64_t num_tokens;
  std::int64_t top_k;
  std::int64_t num_rows;
  std::int64_t hidden;
};

namespace cpu {
void unpermute(const UnpermuteArgs& args);
void unpermute_backward(const UnpermuteBackwardArgs& args);
}  // namespace cpu

namespace cuda {
/// Enqueued on `stream`; no atomics, the same bits on every run.
void unpermute(const UnpermuteArgs& args, CUstream_st* stream);
void unpermute_backward(const UnpermuteBackwardArgs& args, CUstream_st* stream);
}  // namespace cuda

}  // namespace moetuner
