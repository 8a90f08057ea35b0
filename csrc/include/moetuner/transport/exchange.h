#pragma once

#include "moetuner/ops/dtype.h"
#include "moetuner/transport/peers.h"

#include <cstdint>

struct CUstream_st;  // cudaStream_t, without needing CUDA's headers

namespace moetuner::transport {

// The exchange between ranks that map each other's memory. Rows, maps and order are those of
// `dispatch` and `combine`; see moetuner/dispatch.h for the tables.
//
//     route_and_send   slots, ranks and places of all tokens; counts to all peers; rows to peers
//     spread           own and arrived rows to the rows of their experts
//     resend           rows to peers by the maps of an earlier dispatch, in order of arrival
//     sum              sums of a token's rows to its home rank, and the sums of those there
//
// Row i of rank s is the line `first(s) + i` of what arrived, where first(s) adds up the rows of
// the ranks before, or is s * capacity.

/// In a map of lines, of all choices of a line whose row did not come.
constexpr std::int32_t kNoRow = -2;

/// Rows to and from each rank, as the host knows them.
struct Shares {
  std::int32_t sent[kMaxPeers];
  std::int32_t received[kMaxPeers];
};

/// Both kernels of a dispatch. D = min(K, G); T tokens, E experts with R slots at most, N rows that
/// arrive, P = G * S slots, M rows of the experts here.
template <typename Id>
struct DispatchArgs {
  const void* x;                       // [T, row_bytes]
  const Id* topk_ids;                  // [T, K]
  const float* weights;                // [T, K]
  const std::int32_t* candidates;      // [E, R]; null: an id is its slot, E = P
  const std::int32_t* num_candidates;  // [E]
  std::int32_t* send_map;              // [T, D], row on the wire; -1: no more, or no room
  std::int32_t* end_offsets;           // [S]
  std::int32_t* overflow;              // [1], or null
  std::int64_t* counters;              // as RouteArgs has them, whatever was there; or null
  std::int64_t* passed_on;             // [G], rows to each rank; or null
  std::int32_t* workspace;             // dispatch_workspace(...) integers, zeroed by nobody
  // Of `spread` alone:
  void* rows;                   // [M, row_bytes]
  std::int32_t* recv_map;       // [N, K]; with a capacity, kNoRow where no row came
  float* recv_weights;          // [N, K]
  std::uint32_t ticket;         // told with the sizes to the host; 0: tell nothing
  std::int64_t num_tokens;      // T
  std::int64_t top_k;           // K
  std::int64_t num_experts;     // E
  std::int64_t max_candidates;  // R
  std::int64_t slots_per_rank;  // S
  std::int64_t ranks_per_node;
  std::int64_t row_bytes;
  std::int64_t capacity;   // rows from one rank to another; 0: as many as there are
  std::int64_t max_rows;   // M; without a capacity, `spread` does nothing where more come
  std::int64_t max_lines;  // N; alike
  bool adds_overflow;      // to what is there
  int senders;             // blocks that send; 0: as many as suit
};

/// Rows `x` of tokens to the ranks that `send_map` says.
struct ResendArgs {
  const void* x;                 // [T, row_bytes]
  const std::int32_t* send_map;  // [T, D]
  const std::int32_t* lines;     // [N, K] where lines may have no row: the map that says so
  void* received;                // [N, row_bytes]
  Shares shares;
  std::int64_t num_tokens;
  std::int64_t num_destinations;  // D
  std::int64_t row_bytes;
  std::int64_t top_k;  // K of `lines`
  int senders;
};

/// Rounded to `dtype`, partial[n] = sum over k of recv_weights[n, k] * rows[recv_map[n, k]] in the
/// order of k, at the experts' rank; out[t] = sum of its partial ones in the order of ranks. Sums
/// are float32.
struct SumArgs {
  const void* rows;              // [M, H]
  const std::int32_t* recv_map;  // [N, K]; null: row n, K = 1
  const float* recv_weights;     // [N, K]; null: all one
  const std::int32_t* send_map;  // [T, D]
  const std::int32_t* lines;     // [N, lines_top_k] where lines may have no row; else null
  void* out;                     // [T, H]
  Shares shares;
  Dtype dtype;  // of rows and out
  std::int64_t num_tokens;
  std::int64_t top_k;
  std::int64_t num_destinations;
  std::int64_t num_rows;
  std::int64_t hidden;
  std::int64_t lines_top_k;
  int senders;  // blocks; 0: as many as suit
};

namespace cuda {
/// Integers of workspace of one dispatch.
std::int64_t dispatch_workspace(std::int64_t num_tokens,
                                std::int64_t top_k,
                                std::int64_t num_ranks,
                                std::int64_t slots_per_rank);

/// All are enqueued on `stream` and never wait on the host. `route_and_send` and `spread` are one
/// operation, `resend` and `sum` one each: every rank enqueues the same operations in the same
/// order, on one stream.
template <typename Id>
void route_and_send(const DispatchArgs<Id>& args, const Peers& peers, CUstream_st* stream);
template <typename Id>
void spread(const DispatchArgs<Id>& args, const Peers& peers, CUstream_st* stream);
void resend(const ResendArgs& args, const Peers& peers, CUstream_st* stream);
void sum(const SumArgs& args, const Peers& peers, CUstream_st* stream);
}  // namespace cuda

}  // namespace moetuner::transport
