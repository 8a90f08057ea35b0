#pragma once

#include "moetuner/ops/count_routing.h"

#include <cstdint>

namespace moetuner {

/// Copies each token's row to the rows of its experts, in expert order.
///
/// T tokens, K experts per token, E experts that own rows here, R rows out. Rows of one expert
/// stand in token order and start at a multiple of `alignment`:
///
///     rows   [ expert 0 | zeros ][ expert 1 | zeros ] ... [ expert E-1 | zeros ][ zeros ... ]
///                    end_offsets[0]          end_offsets[1]          end_offsets[E-1]      R
///
/// Ids outside [0, num_ids), and ids that the map sends outside [0, E), own no row. With `capacity`
/// C, expert e has the rows [e * C, e * C + C) instead, and its end offset is that of the rows
/// filled. Choices that find no row, there or among the R, own none and are added to `overflow`.
template <typename Id>
struct PermuteArgs {
  const void* x;                   // [T, row_bytes]
  const void* scales;              // [T, scale_bytes], copied along; or null
  const Id* topk_ids;              // [T, K]
  const std::int32_t* expert_map;  // [num_ids], expert here of each id; null: the id itself
  void* rows;                      // [R, row_bytes]
  void* row_scales;                // [R, scale_bytes]; null like scales
  std::int32_t* row_map;           // [T, K], row of each choice; -1: none
  std::int32_t* end_offsets;       // [E], end of each expert's rows, padding included
  std::int32_t* workspace;         // cuda only: permute_workspace(...) integers
  std::int64_t num_tokens;
  std::int64_t top_k;
  std::int64_t num_ids;
  std::int64_t num_experts;
  std::int64_t num_rows;
  std::int64_t row_bytes;
  std::int64_t scale_bytes;
  std::int64_t alignment;
  CountRoutingArgs<Id> counters;  // counted in the same pass; load == nullptr: nothing is
  // Of an exchange:
  std::int64_t capacity = 0;         // rows of each expert; 0: as many as it has
  std::int32_t* overflow = nullptr;  // [1], added to; or null
  bool clears = true;                // zeroes rows without a token; otherwise they stay as they are
};

namespace cpu {
template <typename Id>
void permute(const PermuteArgs<Id>& args);
}

namespace cuda {
/// At most these, so that the counters fit into shared memory.
constexpr std::int64_t kMaxPermuteExperts = 4096;
constexpr std::int64_t kMaxPermuteTopK = 256;

/// Integers of workspace that `permute` needs on the current device.
std::int64_t permute_workspace(std::int64_t num_tokens,
                               std::int64_t top_k,
                               std::int64_t num_experts);

/// Enqueued on `stream`: one kernel for few choices, three for many. No host synchronisation.
template <typename Id>
void permute(const PermuteArgs<Id>& args, CUstream_st* stream);
}  // namespace cuda

}  // namespace moetuner
