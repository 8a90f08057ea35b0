#pragma once

// Rows that have come, to where they belong: first the own ones, then those of peers in the order
// of their rows, each as soon as its flag says that it is there.

#include "moetuner/transport/exchange.h"
#include "peer_waits.cuh"
#include "row_ring.cuh"

namespace moetuner::transport {

/// Rows from each rank and where they begin, in shared memory.
struct Arrivals {
  const std::int32_t* counts;           // [G]; where lines are given, that of all there may be
  const std::int64_t* first;            // [G + 1]
  const std::int32_t* lines = nullptr;  // [N, top_k]: kNoRow where no row came
  std::int64_t top_k = 0;

  __device__ bool has(int sender, std::int64_t index) const {
    return lines == nullptr || lines[(first[sender] + index) * top_k] != kNoRow;
  }
};

/// A row that comes: of a rank, the i-th of it.
struct Arrival {
  int sender;
  std::int64_t index;
};

/// The rows of one of `step` carriers: number `position`, `position` + `step`, ... In 32 bits, as
/// windows have no more rows and 64 take some times as long to divide.
class ArrivalOrder {
 public:
  __device__ ArrivalOrder(const PeerView& view,
                          const Arrivals& arrivals,
                          std::int64_t position,
                          std::int64_t step)
      : arrivals_(arrivals),
        rank_(view.rank()),
        num_ranks_(view.num_ranks()),
        position_(static_cast<int>(position)),
        step_(static_cast<int>(step)) {
    own_ = arrivals.counts[rank_];
    int longest = 0;
    for (int g = 0; g < num_ranks_; ++g) {
      if (g != rank_) longest = max(longest, arrivals.counts[g]);
    }
    end_ = own_ + longest * (num_ranks_ - 1);
    skip();
  }

  __device__ bool ended() const { return position_ >= end_; }
  __device__ Arrival now() const {
    if (position_ < own_) return {rank_, position_};
    const int other = position_ - own_;
    const int index = other / (num_ranks_ - 1);
    const int sender = rank_ + 1 + other - index * (num_ranks_ - 1);
    return {sender < num_ranks_ ? sender : sender - num_ranks_, index};
  }
  __device__ void next() {
    position_ += step_;
    skip();
  }

 private:
  /// Past rows that a rank does not send.
  __device__ void skip() {
    for (; !ended(); position_ += step_) {
      const Arrival arrival = now();
      if (arrival.sender == rank_) return;
      if (ended_ >> arrival.sender & 1) continue;
      if (arrival.index < arrivals_.counts[arrival.sender] &&
          arrivals_.has(arrival.sender, arrival.index)) {
        return;
      }
      ended_ |= 1u << arrival.sender;
      if (__popc(ended_) == num_ranks_ - 1) position_ = end_;
    }
  }

  const Arrivals& arrivals_;
  int rank_, num_ranks_;
  int own_, end_, position_, step_;
  std::uint32_t ended_ = 0;  // ranks of which no more comes
};

template <typename Ring>
class Spreader {
 public:
  /// `first_block`: the first of the blocks that spread.
  __device__ Spreader(const PeerView& view,
                      const Arrivals& arrivals,
                      int first_block,
                      const Carry& carry,
                      char* shared)
      : view_(view),
        drives_(warp_index() < carry.warps && static_cast<int>(blockIdx.x) >= first_block),
        position_(blockIdx.x - first_block +
                  std::int64_t{warp_index()} * (gridDim.x - first_block)),
        step_(std::int64_t{gridDim.x - static_cast<unsigned int>(first_block)} * carry.warps),
        arrivals_(arrivals),
        ring_(carry, shared) {}

  /// `own(i)`: the i-th own row; `place(ring, arrival, piece)` writes the piece that the ring
  /// holds.
  template <typename Own, typename Place>
  __device__ void spread(const Own& own, const Place& place) {
    if (!drives_) return;
    ArrivalOrder reading(view_, arrivals_, position_, step_);
    ArrivalOrder placing(view_, arrivals_, position_, step_);
    const char* from = nullptr;  // row that is being read
    int read = 0;                // pieces of it
    while (!placing.ended()) {
      for (int piece = 0; piece < Ring::kPieces; ++piece) {
        while (!reading.ended() && ring_.has_room()) {
          if (read == 0) {
            const Arrival arrival = reading.now();
            if (!is_here(arrival)) {
              if (ring_.has_pieces()) break;
              if (!await(arrival)) return ring_.abandon();
            }
            from = arrival.sender == view_.rank()
                       ? own(arrival.index)
                       : view_.row(view_.rank(), arrival.sender, arrival.index);
          }
          ring_.read(from, read);
          if (++read < Ring::kPieces) continue;
          read = 0;
          reading.next();
        }
        place(ring_, placing.now(), piece);
        ring_.next();
      }
      placing.next();
    }
    ring_.finish();
  }

 private:
  __device__ const std::uint32_t* flag_of(const Arrival& arrival) const {
    return view_.flag(view_.rank(), arrival.sender, arrival.index);
  }
  __device__ bool is_here(const Arrival& arrival) const {
    if (arrival.sender == view_.rank()) return true;
    const bool here = reached(load_acquire(flag_of(arrival)), view_.epoch());
    if (!__all_sync(kAllLanes, here)) return false;
    fence_copy_engine();
    return true;
  }
  __device__ bool await(const Arrival& arrival) const {
    const bool here = view_.wait_for(Wait::kRows, arrival.sender, flag_of(arrival));
    fence_copy_engine();
    return __all_sync(kAllLanes, here);
  }

  const PeerView& view_;
  bool drives_;
  std::int64_t position_, step_;
  Arrivals arrivals_;
  Ring ring_;
};

}  // namespace moetuner::transport
