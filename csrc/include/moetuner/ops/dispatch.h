#pragma once

#include <cstdint>

struct CUstream_st;  // cudaStream_t, without needing CUDA's headers

namespace moetuner {

// What `dispatch` does beside permuting and sending. A slot is a place for an expert: slot p lives
// on rank p / S. With each row travel 2 K integers,
//
//     [ slots of the token: K ][ bits of its float32 weights: K ]
//
// and slot -1 is none.

/// Finds the slots of each token, and the ranks where they are.
///
/// T tokens, K experts per token, E experts with R slots at most, G ranks with S slots each, N
/// nodes. Tokens leave for places, which are ranks or, where rows first cross between nodes, nodes:
/// D = min(K, places). Token t takes slot candidates[e, t % num_candidates[e]] of expert e. Ids
/// outside [0, E) are padding, and so are choices whose table entries are out of range.
template <typename Id>
struct RouteArgs {
  const Id* topk_ids;                  // [T, K]
  const float* weights;                // [T, K]
  const std::int32_t* candidates;      // [E, R]
  const std::int32_t* num_candidates;  // [E]
  std::int32_t* destinations;          // [T, D], distinct places in rising order; -1: no more
  std::int32_t* travel;                // [T, 2 K]
  std::int32_t* counts;                // [G, 2] zeros, added to: rows and choices; or null
  std::int64_t* counters;              // [1 + G + N + P], added to (ExchangeCounters); or null
  std::int32_t* blank;                 // [blank_size], set to -1; or null
  std::int32_t* overflow;              // [1], set to 0; or null
  std::int64_t blank_size;
  std::int64_t num_tokens;
  std::int64_t top_k;
  std::int64_t num_experts;
  std::int64_t max_candidates;  // R
  std::int64_t slots_per_rank;
  std::int64_t num_ranks;
  std::int64_t ranks_per_node;
  std::int64_t ranks_per_place;   // 1, or ranks_per_node
  std::int64_t num_destinations;  // D

  std::int64_t num_slots() const { return num_ranks * slots_per_rank; }
  std::int64_t num_nodes() const { return num_ranks / ranks_per_node; }
};

/// Finds the ranks of one node that rows which crossed to it must visit there.
///
/// A rows, R ranks of the node with S slots each, whose slots begin at `first_slot`;
/// D = min(K, R).
struct SpreadArgs {
  const std::int32_t* travel;  // [A, 2 K]
  std::int32_t* destinations;  // [A, D], distinct ranks of the node in rising order; -1: no more
  std::int64_t* counters;      // [R], added to: rows to each rank; or null
  std::int32_t* blank;         // [blank_size], set to -1; or null
  std::int64_t blank_size;
  std::int64_t num_rows;
  std::int64_t top_k;
  std::int64_t first_slot;
  std::int64_t slots_per_rank;
  std::int64_t num_ranks;         // R
  std::int64_t num_destinations;  // D
};

/// Takes apart what travelled to the rank whose slots begin at `first_slot`.
struct UnpackArgs {
  const std::int32_t* travel;  // [N, 2 K]
  std::int32_t* slots;         // [N, K], counted from the first slot here; -1: elsewhere or none
  float* weights;              // [N, K]
  std::int64_t num_rows;
  std::int64_t top_k;
  std::int64_t first_slot;
  std::int64_t slots_per_rank;
};

namespace cpu {
template <typename Id>
void route(const RouteArgs<Id>& args);
void spread(const SpreadArgs& args);
void unpack(const UnpackArgs& args);
}  // namespace cpu

namespace cuda {
/// Ranks, nodes and slots are counted in shared memory.
constexpr std::int64_t kMaxRouteSlots = 8192;  // and ranks and nodes

/// Enqueued on `stream`; counts are exact whatever the order of their atomics.
template <typename Id>
void route(const RouteArgs<Id>& args, CUstream_st* stream);
void spread(const SpreadArgs& args, CUstream_st* stream);
void unpack(const UnpackArgs& args, CUstream_st* stream);
}  // namespace cuda

}  // namespace moetuner
