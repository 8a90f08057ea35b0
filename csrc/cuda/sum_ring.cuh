#pragma once

// Sums of rows through shared memory: the copy engine reads pieces of all rows of a line, some
// lines ahead, and a warp adds them up. A warp's memory is a ring of stages, each with one piece of
// every row of a line, those of experts here first, then what peers have stored:
//
//     [ row 0 ][ row 1 ] ... [ stored 0 ][ stored 1 ] ...        a piece each, of `bytes`
//
// The more rows, the shorter the pieces. Lanes store the sums as they make them; one more warp sets
// the flags of those for peers.

#include "arrived_rows.cuh"
#include "bulk_copy.cuh"
#include "flag_board.cuh"
#include "moetuner/transport/exchange.h"
#include "peer_waits.cuh"
#include "send_rows.cuh"
#include "sum_lines.cuh"

#include <cuda_runtime.h>

namespace moetuner::transport {

/// A line, as its pieces are added up.
struct SumLine {
  char* out;
  std::uint32_t* flag;   // of who waits for the sum; null: nobody
  unsigned int visits;   // a bit for each part of the sum at home; zero: the rows here alone
  unsigned int here;     // the one of them that is made of the rows here
  int rows;              // here
  int bytes;             // of a piece of all but the last
  int pieces;            // of the row
  float weights[kWarp];  // of the rows here
};

template <typename T>
class SumRing {
 public:
  static constexpr int kWarps = 12;  // that add
  static constexpr int kThreads = (kWarps + 1) * kWarp;
  static constexpr int kMostRows = 16;
  static constexpr int kUnit = kWarp * 16;  // bytes that a warp adds at a time
  static constexpr int kStageBytes = kMostRows * kUnit;
  static constexpr int kStages = 2;
  static constexpr int kTogether = 2;         // units that a warp adds side by side
  static constexpr int kLines = kStages + 1;  // on their way
  static constexpr std::int64_t kOfWarp =
      kStages * (kStageBytes + 8) + kLines * std::int64_t{sizeof(SumLine)};
  static constexpr std::int64_t kShared = kWarps * kOfWarp + sizeof(FlagBoard<kWarps>);

  __device__ explicit SumRing(char* shared) {
    stages_ = shared + warp_index() * kStages * kStageBytes;
    char* tables = shared + kWarps * kStages * kStageBytes;
    barriers_ = reinterpret_cast<std::uint64_t*>(tables) + warp_index() * kStages;
    lines_ = reinterpret_cast<SumLine*>(tables + kWarps * kStages * 8) + warp_index() * kLines;
    char* board = tables + kWarps * (kStages * 8 + kLines * sizeof(SumLine));
    board_ = reinterpret_cast<FlagBoard<kWarps>*>(board);
    board_->clear();
    if (adds() && lane_index() == 0) {
      for (int s = 0; s < kStages; ++s) bulk::init(&barriers_[s]);
    }
    __syncwarp();
  }

  /// Sums of the rows here of each token of a peer, into its window.
  __device__ void send(const SumArgs& args,
                       const PeerView& view,
                       const Arrivals& arrivals,
                       int team_warps) {
    if (!adds()) return board_->keep(view.epoch());
    const Team team(team_warps);
    const std::int64_t position = blockIdx.x + std::int64_t{team.index} * args.senders;
    ArrivalOrder order(
        view, arrivals, position, std::int64_t{args.senders} * team.per_block(kWarps));
    const auto rows_of = [&](const Arrival& arrival) {
      return rows_at(args, arrivals.first[arrival.sender] + arrival.index);
    };
    Rows ahead = order.ended() ? Rows{} : rows_of(order.now());
    run(
        args,
        team,
        [&] { return !order.ended(); },
        [](bool) { return true; },
        [&] {
          const Arrival arrival = order.now();
          Next next{.rows = ahead};
          next.out = view.row(arrival.sender, view.rank(), arrival.index);
          next.flag = view.flag(arrival.sender, view.rank(), arrival.index);
          order.next();
          if (!order.ended()) ahead = rows_of(order.now());
          return next;
        },
        view.epoch());
    if (lane_index() == 0) board_->close();
  }

  /// Own tokens: the rows here, and what peers have stored.
  __device__ void add_up(const SumArgs& args,
                         const PeerView& view,
                         const std::int64_t* first_sent,
                         const std::int64_t* first_received,
                         int first_home,
                         int team_warps) {
    if (!adds()) return;
    const Team team(team_warps);
    const int blocks = static_cast<int>(gridDim.x) - first_home;
    std::int64_t token = blockIdx.x - first_home + std::int64_t{team.index} * blocks;
    Visit visit = visit_at(args, view, first_sent, token);
    run(
        args,
        team,
        [&] { return token < args.num_tokens; },
        [&](bool may_wait) { return is_there(view, visit, may_wait); },
        [&] {
          const unsigned int all = __ballot_sync(kAllLanes, visit.rank >= 0);
          const unsigned int here = __ballot_sync(kAllLanes, visit.rank == view.rank());
          Next next{};
          if (here != 0) {
            const int row = __shfl_sync(kAllLanes, visit.row, __ffs(static_cast<int>(here)) - 1);
            next.rows = rows_at(args, first_received[view.rank()] + row);
          }
          if (visit.rank >= 0 && visit.rank != view.rank()) {
            next.stored = view.row(view.rank(), visit.rank, visit.row);
          }
          next.visits = all;
          next.here = here;
          next.at_home = true;
          next.out = static_cast<char*>(args.out) +
                     token * args.hidden * static_cast<std::int64_t>(sizeof(T));
          token += std::int64_t{blocks} * team.per_block(kWarps);
          visit = visit_at(args, view, first_sent, token);
          return next;
        },
        view.epoch());
  }

 private:
  using Values = Columns<T, kWide<T>>;

  /// Rows of a line, a choice for each lane.
  struct Rows {
    const char* row = nullptr;
    float weight = 0.0f;
  };

  struct Next {
    Rows rows;
    const char* stored = nullptr;  // a visit for each lane
    unsigned int visits = 0, here = 0;
    bool at_home = false;
    char* out = nullptr;
    std::uint32_t* flag = nullptr;
  };

  /// Whether this warp adds, or sets flags.
  __device__ static bool adds() { return warp_index() < kWarps; }

  __device__ static Rows rows_at(const SumArgs& args, std::int64_t line) {
    if (lane_index() >= args.top_k) return {};
    const std::int64_t at = line * args.top_k + lane_index();
    const std::int64_t row = args.recv_map ? args.recv_map[at] : line;
    if (row < 0 || row >= args.num_rows) return {};
    return {static_cast<const char*>(args.rows) +
                row * args.hidden * static_cast<std::int64_t>(sizeof(T)),
            args.recv_weights ? args.recv_weights[at] : 1.0f};
  }

  __device__ static Visit visit_at(const SumArgs& args,
                                   const PeerView& view,
                                   const std::int64_t* first_sent,
                                   std::int64_t token) {
    if (token >= args.num_tokens || lane_index() >= args.num_destinations) return {-1, -1};
    const std::int64_t at = token * args.num_destinations + lane_index();
    return visit_of_row(args.send_map[at], first_sent, view.num_ranks());
  }

  __device__ static bool is_there(const PeerView& view, const Visit& visit, bool may_wait) {
    bool there = true;
    if (visit.rank >= 0 && visit.rank != view.rank()) {
      const std::uint32_t* flag = view.flag(view.rank(), visit.rank, visit.row);
      there = may_wait ? view.wait_for(Wait::kSums, visit.rank, flag)
                       : reached(load_acquire(flag), view.epoch());
    }
    if (!__all_sync(kAllLanes, there)) return false;
    fence_copy_engine();
    return true;
  }

  /// Adds up all lines that `take()` gives while `more()`; `ready(may_wait)` says whether the next
  /// one's parts are there.
  template <typename More, typename Ready, typename Take>
  __device__ void run(const SumArgs& args,
                      const Team& team,
                      const More& more,
                      const Ready& ready,
                      const Take& take,
                      std::uint32_t epoch) {
    row_bytes_ = static_cast<int>(args.hidden * sizeof(T));
    Next reading{};
    int read_piece = 0;  // of the line that is read; it has read_pieces_
    int read_pieces = 0;
    int begun = 0;  // lines that were begun to read
    int ended = 0;  // lines that are added up
    int added_piece = team.member;
    while (true) {
      while (read_ - added_ < kStages) {
        if (read_piece >= read_pieces) {
          if (begun - ended >= kLines || !more()) break;
          if (!ready(false)) {
            if (begun > ended) break;
            if (!ready(true)) break;
          }
          reading = take();
          read_pieces = begin_line(lines_[begun % kLines], reading, team);
          ++begun;
          read_piece = team.member;
          if (read_piece >= read_pieces) continue;
        }
        read(lines_[(begun - 1) % kLines], reading, read_piece);
        read_piece += team.warps;
      }
      if (begun == ended) break;
      const SumLine& line = lines_[ended % kLines];
      if (added_piece < line.pieces) {
        add(line, added_piece);
        added_piece += team.warps;
      }
      if (added_piece < line.pieces) continue;
      if (line.flag != nullptr) end_line(line.flag, team, epoch);
      __syncwarp();
      ++ended;
      added_piece = team.member;
    }
  }

  /// Sets the flag of a sum that all its warps have stored, or hands it in: where many warps share
  /// a line, lines are few.
  __device__ void end_line(std::uint32_t* flag, const Team& team, std::uint32_t epoch) {
    team.sync();
    if (team.member != 0 || lane_index() != 0) return;
    if (team.warps == 1) {
      board_->give(flag);
    } else {
      store_release(flag, epoch);
    }
  }

  /// Writes down a line whose rows are known; returns its pieces.
  __device__ int begin_line(SumLine& line, const Next& next, const Team& team) {
    const unsigned int rows = __ballot_sync(kAllLanes, next.rows.row != nullptr);
    const unsigned int stored = __ballot_sync(kAllLanes, next.stored != nullptr);
    const int count = max(__popc(rows) + __popc(stored), 1);
    const int units = (row_bytes_ + kUnit - 1) / kUnit;
    const int of_stage = kMostRows / count;
    const int of_piece = max(min(of_stage, (units + team.warps - 1) / team.warps), 1);
    if (next.rows.row) {
      line.weights[__popc(rows & ((1u << lane_index()) - 1))] = next.rows.weight;
    }
    if (lane_index() == 0) {
      line.out = next.out;
      line.flag = next.flag;
      line.visits = next.at_home ? next.visits : 0;
      line.here = next.at_home ? next.here : 0;
      line.rows = __popc(rows);
      line.bytes = of_piece * kUnit;
      line.pieces = (row_bytes_ + line.bytes - 1) / line.bytes;
    }
    __syncwarp();
    return line.pieces;
  }

  __device__ int bytes_of(const SumLine& line, int piece) const {
    return min(line.bytes, row_bytes_ - piece * line.bytes);
  }

  /// Begins to read a piece of all rows of a line, which each lane knows one of.
  __device__ void read(const SumLine& line, const Next& next, int piece) {
    char* stage = stages_ + read_ % kStages * kStageBytes;
    std::uint64_t* barrier = &barriers_[read_ % kStages];
    const unsigned int before = (1u << lane_index()) - 1;
    const unsigned int rows = __ballot_sync(kAllLanes, next.rows.row != nullptr);
    const unsigned int stored = __ballot_sync(kAllLanes, next.stored != nullptr);
    const int bytes = bytes_of(line, piece);
    if (lane_index() == 0) bulk::expect(barrier, bytes * (__popc(rows) + __popc(stored)));
    __syncwarp();
    const std::int64_t offset = std::int64_t{piece} * line.bytes;
    if (next.rows.row) {
      bulk::load(
          stage + __popc(rows & before) * line.bytes, next.rows.row + offset, bytes, barrier);
    }
    if (next.stored) {
      const int at = __popc(rows) + __popc(stored & before);
      bulk::load(stage + at * line.bytes, next.stored + offset, bytes, barrier);
    }
    ++read_;
  }

  /// Adds up a piece and stores its sum.
  __device__ void add(const SumLine& line, int piece) {
    const char* stage = stages_ + added_ % kStages * kStageBytes;
    bulk::wait(&barriers_[added_ % kStages], added_ / kStages % 2);
    add_units(line, stage, line.out + std::int64_t{piece} * line.bytes, bytes_of(line, piece));
    __syncwarp();
    ++added_;
  }

  /// Adds up this lane's columns of a piece: some units side by side, and of each the next row is
  /// on its way while one is added.
  __device__ static void add_units(const SumLine& line, const char* stage, char* out, int bytes) {
    const int rows = line.rows;  // in registers, as stores below might change what is in memory
    const int step = line.bytes;
    const unsigned int visits = line.visits;
    const unsigned int here = line.here;
    for (int at = lane_index() * 16; at < bytes; at += kTogether * kUnit) {
      const char* from = stage + at;
      float sums[kTogether][kWide<T>] = {};
      Part next = rows > 0 ? part_of(from, bytes - at, line.weights[0]) : Part{};
      for (int row = 0; row < rows; ++row) {
        const Part part = next;
        if (row + 1 < rows) {
          next = part_of(from + (row + 1) * step, bytes - at, line.weights[row + 1]);
        }
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
#pragma unroll
          for (int w = 0; w < kWide<T>; ++w) sums[u][w] += part.weight * part.units[u][w];
        }
      }
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const int offset = u * kUnit;
        if (at + offset >= bytes) break;
        Values result = rounded<T>(sums[u]);
        if (visits != 0) {
          result = add_visits(visits, here, from + offset + rows * step, step, result);
        }
        *reinterpret_cast<uint4*>(out + at + offset) = result.word;
      }
    }
  }

  /// Of one row, those of `kTogether` units that begin before `bytes`.
  struct Part {
    Values units[kTogether];
    float weight;
  };

  __device__ static Part part_of(const char* from, int bytes, float weight) {
    Part part{};
    part.weight = weight;
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (u * kUnit < bytes) {
        part.units[u].word = *reinterpret_cast<const uint4*>(from + u * kUnit);
      }
    }
    return part;
  }

  /// The sum of what the visits have left, in their order; `here` was made of the rows here.
  __device__ static Values add_visits(unsigned int visits,
                                      unsigned int here_visit,
                                      const char* stored,
                                      int step,
                                      const Values& here) {
    constexpr int kWidth = kWide<T>;
    float total[kWidth] = {};
    for (unsigned int left = visits; left != 0; left &= left - 1) {
      const bool is_here = (left & -left) == here_visit;
      Values values = here;
      if (!is_here) {
        values.word = *reinterpret_cast<const uint4*>(stored);
        stored += step;
      }
#pragma unroll
      for (int w = 0; w < kWidth; ++w) total[w] += values[w];
    }
    return rounded<T>(total);
  }

  char* stages_;
  std::uint64_t* barriers_;
  SumLine* lines_;
  int row_bytes_ = 0;
  FlagBoard<kWarps>* board_;
  int read_ = 0, added_ = 0;  // pieces
};

}  // namespace moetuner::transport
