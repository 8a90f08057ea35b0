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
#include "sum_units.cuh"

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace moetuner::transport {

/// A line, as its pieces are added up.
struct SumLine {
  static constexpr int kMostRows = 16;

  char* out;
  std::uint32_t* flag;       // of who waits for the sum; null: nobody
  unsigned int visits;       // a bit for each part of the sum at home; zero: the rows here alone
  unsigned int here;         // the one of them that is made of the rows here
  int rows;                  // here
  int bytes;                 // of a piece of all but the last
  int pieces;                // of the row
  float weights[kMostRows];  // of the rows here
};

template <typename T>
class SumRing {
 public:
  static constexpr int kWarps = 12;  // that add
  static constexpr int kThreads = (kWarps + 1) * kWarp;
  static constexpr int kMostRows = SumLine::kMostRows;
  static constexpr int kUnit = kWarp * 16;  // bytes that a warp adds at a time
  static constexpr int kStageBytes = kMostRows * kUnit;
  static constexpr int kStages = 2;
  static constexpr int kLines = 2 * kStages;  // on their way; a power of two divides fast
  static constexpr std::int64_t kOfWarp =
      kStages * (kStageBytes + 8) + kLines * std::int64_t{sizeof(SumLine)};
  static constexpr std::int64_t kShared = kWarps * kOfWarp + sizeof(FlagBoard<kWarps>);

  __device__ explicit SumRing(char* shared) {
    char* tables = shared + kWarps * kStages * kStageBytes;
    stages_ = bulk::kept_address(shared + warp_index() * kStages * kStageBytes);
    barriers_ = bulk::kept_address(tables + warp_index() * kStages * 8);
    lines_ = reinterpret_cast<SumLine*>(tables + kWarps * kStages * 8) + warp_index() * kLines;
    lines_address_ = bulk::kept_address(lines_);
    char* board = tables + kWarps * (kStages * 8 + kLines * sizeof(SumLine));
    board_ = reinterpret_cast<FlagBoard<kWarps>*>(board);
    board_->clear();
    if (adds() && lane_index() == 0) {
      for (int s = 0; s < kStages; ++s) bulk::init(bulk::Shared(barriers_ + 8 * s));
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
    run<false>(
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
    run<true>(
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
          next.out = static_cast<char*>(args.out) +
                     token * args.hidden * static_cast<std::int64_t>(sizeof(T));
          token += std::int64_t{blocks} * team.per_block(kWarps);
          visit = visit_at(args, view, first_sent, token);
          return next;
        },
        view.epoch());
  }

 private:
  /// Rows of a line, a choice for each lane.
  struct Rows {
    const char* row = nullptr;
    float weight = 0.0f;
  };

  struct Next {
    Rows rows;
    const char* stored = nullptr;  // a visit for each lane
    unsigned int visits = 0, here = 0;
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

  /// What is read: this lane's rows of a line, and where their pieces go in a stage.
  struct Reading {
    const char *row = nullptr, *stored = nullptr;
    int row_at = 0, stored_at = 0;
    int count = 0;  // of all lanes
    int bytes = 0, pieces = 0, piece = 0;
  };

  /// What is added up: a line, and which of its pieces is next.
  struct Adding {
    SumLine* line;
    char* out;
    std::uint32_t weights;  // where they are
    unsigned int visits, here;
    int rows, bytes, pieces, piece;
  };

  /// Adds up all lines that `take()` gives while `more()`; `ready(may_wait)` says whether the next
  /// one's parts are there. kHome: they may have parts that peers have stored.
  template <bool kHome, typename More, typename Ready, typename Take>
  __device__ void run(const SumArgs& args,
                      const Team& team,
                      const More& more,
                      const Ready& ready,
                      const Take& take,
                      std::uint32_t epoch) {
    set_pieces(static_cast<int>(args.hidden * sizeof(T)), team);
    Reading reading;
    Adding adding{};
    unsigned int begun = 0;  // lines that were begun to read
    unsigned int ended = 0;  // lines that are added up
    while (true) {
      while (read_ - added_ < kStages) {
        if (reading.piece >= reading.pieces) {
          if (begun - ended >= kLines || !more()) break;
          if (!ready(false)) {
            if (begun > ended) break;
            if (!ready(true)) break;
          }
          reading = begin_line<kHome>(lines_[begun % kLines], take(), team);
          ++begun;
          if (reading.piece >= reading.pieces) continue;
        }
        read<kHome>(reading);
        reading.piece += team.warps;
      }
      if (begun == ended) break;
      if (adding.line == nullptr) adding = adding_of(ended % kLines, team);
      if (adding.piece < adding.pieces) {
        add<kHome>(adding);
        adding.piece += team.warps;
      }
      if (adding.piece < adding.pieces) continue;
      if (!kHome) end_line(adding.line->flag, team, epoch);
      __syncwarp();
      adding.line = nullptr;
      ++ended;
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

  /// How rows are cut into pieces, a lane for each number of rows of a line: the more, the shorter.
  __device__ void set_pieces(int row_bytes, const Team& team) {
    row_bytes_ = row_bytes;
    const int units = (row_bytes + kUnit - 1) / kUnit;
    const int of_stage = kMostRows / max(lane_index(), 1);
    bytes_of_count_ = max(min(of_stage, (units + team.warps - 1) / team.warps), 1) * kUnit;
    pieces_of_count_ = (row_bytes + bytes_of_count_ - 1) / bytes_of_count_;
  }

  /// Writes down a line whose rows are known.
  template <bool kHome>
  __device__ Reading begin_line(SumLine& line, const Next& next, const Team& team) {
    const unsigned int before = (1u << lane_index()) - 1;
    const unsigned int rows = __ballot_sync(kAllLanes, next.rows.row != nullptr);
    const unsigned int stored = kHome ? __ballot_sync(kAllLanes, next.stored != nullptr) : 0;
    const int num_rows = __popc(rows);
    Reading out{.row = next.rows.row, .stored = next.stored, .piece = team.member};
    out.count = num_rows + __popc(stored);
    out.bytes = __shfl_sync(kAllLanes, bytes_of_count_, out.count);
    out.pieces = __shfl_sync(kAllLanes, pieces_of_count_, out.count);
    const int own = __popc(rows & before);
    out.row_at = own * out.bytes;
    out.stored_at = (num_rows + __popc(stored & before)) * out.bytes;
    if (next.rows.row) line.weights[own] = next.rows.weight;
    if (lane_index() == 0) {
      line.out = next.out;
      line.flag = next.flag;
      line.visits = next.visits;
      line.here = next.here;
      line.rows = num_rows;
      line.bytes = out.bytes;
      line.pieces = out.pieces;
    }
    __syncwarp();
    return out;
  }

  __device__ Adding adding_of(unsigned int index, const Team& team) const {
    SumLine* line = &lines_[index];
    return {.line = line,
            .out = line->out,
            .weights = lines_address_ + index * static_cast<std::uint32_t>(sizeof(SumLine)) +
                       static_cast<std::uint32_t>(offsetof(SumLine, weights)),
            .visits = line->visits,
            .here = line->here,
            .rows = line->rows,
            .bytes = line->bytes,
            .pieces = line->pieces,
            .piece = team.member};
  }

  /// Begins to read the next piece of all rows of a line.
  template <bool kHome>
  __device__ void read(const Reading& reading) {
    const std::uint32_t stage = stages_ + read_ % kStages * kStageBytes;
    const bulk::Shared barrier(barriers_ + read_ % kStages * 8);
    const int offset = reading.piece * reading.bytes;
    const int bytes = min(reading.bytes, row_bytes_ - offset);
    if (lane_index() == 0) bulk::expect(barrier, bytes * reading.count);
    __syncwarp();
    if (reading.row) {
      bulk::load(bulk::Shared(stage + reading.row_at), reading.row + offset, bytes, barrier);
    }
    if (kHome && reading.stored) {
      bulk::load(bulk::Shared(stage + reading.stored_at), reading.stored + offset, bytes, barrier);
    }
    ++read_;
  }

  /// Adds up the next piece and stores its sum: some units side by side, while there are.
  template <bool kHome>
  __device__ void add(const Adding& adding) {
    const unsigned int stage = added_ % kStages;
    bulk::wait(bulk::Shared(barriers_ + stage * 8), static_cast<int>(added_ / kStages % 2));
    const int offset = adding.piece * adding.bytes;
    const int lane_at = lane_index() * 16;
    std::uint32_t from = stages_ + stage * kStageBytes + lane_at;
    char* out = adding.out + offset + lane_at;
    int left = min(adding.bytes, row_bytes_ - offset);
    const auto add_units = [&]<int kUnits>(std::integral_constant<int, kUnits>) {
      Units<T, kUnits> sum = sum_rows<T, kUnits>(from, adding.bytes, adding.rows, adding.weights);
      if constexpr (kHome) {
        sum = sum_visits<T, kUnits>(
            adding.visits, adding.here, from + adding.rows * adding.bytes, adding.bytes, sum);
      }
      sum.store(out);
      from += kUnits * kUnit;
      out += kUnits * kUnit;
      left -= kUnits * kUnit;
    };
    while (left >= 4 * kUnit) add_units(std::integral_constant<int, 4>());
    if (left >= 2 * kUnit) add_units(std::integral_constant<int, 2>());
    while (left > lane_at) add_units(std::integral_constant<int, 1>());
    __syncwarp();
    ++added_;
  }

  std::uint32_t stages_, barriers_, lines_address_;  // of this warp, in shared memory
  SumLine* lines_;
  FlagBoard<kWarps>* board_;
  int row_bytes_ = 0;
  int bytes_of_count_ = 0, pieces_of_count_ = 0;
  unsigned int read_ = 0, added_ = 0;  // pieces
};

}  // namespace moetuner::transport
