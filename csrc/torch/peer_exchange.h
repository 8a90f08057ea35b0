#pragma once

#include "dispatch_forward.h"

#include <string>
#include <vector>

// The exchange over memory that the ranks of a group map: the same tensors as over a communicator.
// Each returns false, or nothing, where rows of this group do not go this way.

namespace moetuner {

#ifdef MOETUNER_WITH_CUDA

bool dispatch_over_peers(const DispatchInputs& in, const Sizes& sizes, Dispatched& out);

/// Sums of `rows` [M, H] by `recv_map` at home, or where `by_lines`, of `rows` [N, H] as they are.
at::Tensor sum_over_peers(const char* op,
                          const at::Tensor& rows,
                          const at::Tensor& recv_map,
                          const OptionalTensor& recv_weights,
                          bool by_lines,
                          const at::Tensor& send_map,
                          const at::Tensor& splits,
                          const std::string& group_name);

/// Rows [T, H] of tokens to all lines where theirs arrived, [N, H].
at::Tensor resend_over_peers(const char* op,
                             const at::Tensor& rows,
                             const at::Tensor& recv_map,
                             const at::Tensor& send_map,
                             const at::Tensor& splits,
                             const std::string& group_name);

#endif

/// Whether an earlier dispatch of this group went over peer memory; `groups` of one hop.
bool goes_over_peers(const at::Tensor& rows, const std::vector<std::string>& groups);

}  // namespace moetuner
