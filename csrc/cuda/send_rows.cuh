#pragma once

// Rows to peers: each token's row is read once and stored into the windows of all ranks that it
// goes to, with its note; when it is there, its flag is set.

#include "peer_waits.cuh"
#include "row_ring.cuh"

namespace moetuner::transport {

/// Where a token goes: rank and row there, or nowhere.
struct Visit {
  int rank, row;
};

/// The visit of a row on the wire; `first` [G + 1] says which rows go to which rank.
__device__ inline Visit visit_of_row(std::int64_t row, const std::int64_t* first, int num_ranks) {
  if (row < 0) return {-1, -1};
  int g = 0;
  while (g < num_ranks - 1 && row >= first[g + 1]) ++g;
  return {g, static_cast<int>(row - first[g])};
}

/// The tokens first, first + step, ... < last of one warp.
struct Turns {
  std::int64_t first, last, step;
};

template <typename Ring>
class Sender {
 public:
  __device__ Sender(const PeerView& view,
                    const char* x,
                    std::int64_t row_bytes,
                    const Turns& turns,
                    const Carry& carry,
                    char* shared)
      : view_(view),
        x_(x),
        row_bytes_(row_bytes),
        turns_(turns),
        next_read_(turns.first),
        drives_(warp_index() < carry.warps),
        ring_(carry, shared) {}

  /// Begins to read rows: it need not be known yet where they go.
  __device__ void read_ahead() {
    if (!drives_) return;
    while (ring_.has_room() && next_read_ < turns_.last) {
      ring_.read(x_ + next_read_ * row_bytes_, next_piece_);
      if (++next_piece_ < Ring::kPieces) continue;
      next_piece_ = 0;
      next_read_ += turns_.step;
    }
  }

  /// Sends nothing after all.
  __device__ void abandon() {
    if (drives_) ring_.abandon();
  }

  /// Sends all rows. `visit_of(token, j)` is the j-th visit of a token, j < `num_visits` <= 32;
  /// `note_of(token)` its note of `note_ints`.
  template <typename VisitOf, typename NoteOf>
  __device__ void send(int num_visits,
                       int note_ints,
                       const VisitOf& visit_of,
                       const NoteOf& note_of) {
    if (!drives_) return;
    std::uint32_t* earlier = nullptr;  // flag of the row before, which may not be there yet
    for (std::int64_t token = turns_.first; token < turns_.last; token += turns_.step) {
      read_ahead();
      const Visit visit = lane_index() < num_visits ? visit_of(token, lane_index()) : Visit{-1, -1};
      const bool goes = visit.row >= 0 && visit.rank != view_.rank();
      send_note(visit, goes, note_ints, note_of(token));
      char* to = goes ? view_.row(visit.rank, view_.rank(), visit.row) : nullptr;
#pragma unroll
      for (int piece = 0; piece < Ring::kPieces; ++piece) {
        ring_.await();
        ring_.write(to, piece);
        ring_.next();
        read_ahead();
      }
      std::uint32_t* flag = goes ? view_.flag(visit.rank, view_.rank(), visit.row) : nullptr;
      ring_.await_row_before();
      __syncwarp();
      set(Ring::kFlagsLate ? earlier : flag);
      earlier = flag;
    }
    ring_.finish();
    __syncwarp();
    if (Ring::kFlagsLate) set(earlier);
  }

 private:
  __device__ void send_note(const Visit& visit,
                            bool goes,
                            int note_ints,
                            const std::int32_t* note) {
    if (note_ints == 0) return;
    unsigned int lanes = __ballot_sync(kAllLanes, goes);
    for (; lanes != 0; lanes &= lanes - 1) {
      const int j = __ffs(static_cast<int>(lanes)) - 1;
      const int rank = __shfl_sync(kAllLanes, visit.rank, j);
      const int row = __shfl_sync(kAllLanes, visit.row, j);
      std::int32_t* to = view_.note(rank, view_.rank(), row);
      for (int i = lane_index(); i < note_ints; i += kWarp) to[i] = __ldcg(note + i);
    }
  }

  __device__ void set(std::uint32_t* flag) const {
    if (flag) store_release(flag, view_.epoch());
  }

  const PeerView& view_;
  const char* x_;
  std::int64_t row_bytes_;
  Turns turns_;
  std::int64_t next_read_;
  int next_piece_ = 0;
  bool drives_;
  Ring ring_;
};

/// Warps that carry rows of x, one after another, over all sending blocks.
__device__ inline Turns sending_turns(std::int64_t num_tokens, int senders, const Carry& carry) {
  const int block = static_cast<int>(blockIdx.x);
  const std::int64_t first = block < senders && warp_index() < carry.warps
                                 ? block + std::int64_t{warp_index()} * senders
                                 : num_tokens;
  return {first, num_tokens, std::int64_t{senders} * carry.warps};
}

}  // namespace moetuner::transport
