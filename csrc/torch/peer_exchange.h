#pragma once

#include "dispatch_forward.h"

#include <string>
#include <vector>

// The exchange over memory that the ranks of a group map: the same tensors as over a communicator.
// It takes the only hop of a way, or the last of two, which stays inside a node.

namespace moetuner {

#ifdef MOETUNER_WITH_CUDA

/// Of one hop. False, and nothing is done, where rows of this group do not go this way.
bool dispatch_over_peers(const DispatchInputs& in, const Sizes& sizes, Dispatched& out);

/// Whether the last of two hops goes this way: decided at the first call, with all ranks. It comes
/// ahead of the first hop, and throws where a rank has given up: that one takes no part in either.
bool passes_on_over_peers(const DispatchInputs& in, const Sizes& sizes);

/// What crossed to this node, `rows` [A, H] and `travel` [A, 2 K], to the ranks of its experts;
/// adds to `out`, whose overflow and counters there are.
void pass_on_over_peers(const DispatchInputs& in,
                        const Path& path,
                        const Sizes& sizes,
                        const at::Tensor& rows,
                        const at::Tensor& travel,
                        Dispatched& out);

/// Sums of `rows` [M, H] by `recv_map` at the begin of the hop, or where `by_lines`, of `rows`
/// [N, H] as they are.
at::Tensor sum_over_peers(const char* op,
                          const at::Tensor& rows,
                          const at::Tensor& recv_map,
                          const OptionalTensor& recv_weights,
                          bool by_lines,
                          const Hop& hop);

/// Rows [T, H] at the begin of the hop to all lines where theirs arrived, [N, H].
at::Tensor resend_over_peers(const char* op,
                             const at::Tensor& rows,
                             const at::Tensor& recv_map,
                             const Hop& hop);

/// Whether an earlier dispatch of this group went over peer memory. Ahead of all hops, and throws
/// as `passes_on_over_peers` does.
bool goes_over_peers(const char* op, const at::Tensor& rows, const std::string& group_name);

#endif

}  // namespace moetuner
