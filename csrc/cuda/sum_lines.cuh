#pragma once

// Sums of rows through registers: a lane adds up some columns of a line's rows, which it has in
// flight at a time. For rows of any alignment, and any number of them.

#include "arrived_rows.cuh"
#include "moetuner/transport/exchange.h"
#include "numeric.cuh"
#include "peer_waits.cuh"
#include "send_rows.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace moetuner::transport {

constexpr int kSumThreads = 512;
constexpr int kSumWarps = kSumThreads / kWarp;
constexpr int kMostRows = 8;  // of a line that are added from registers

/// Warps of a team, which divide those of a block: enough for all warps to have something to do.
struct Teams {
  int of_senders, of_homes;
};

/// The warps of a block that share a row.
struct Team {
  int warps, index, member;  // `index` in the block, `member` in the team

  __device__ explicit Team(int size)
      : warps(size), index(warp_index() / size), member(warp_index() % size) {}

  __device__ int per_block(int warps_of_block) const { return warps_of_block / warps; }
  __device__ void sync() const {
    if (warps == 1) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(index + 1), "r"(warps * kWarp) : "memory");
    }
  }
};

/// Columns of a lane as they are loaded: one word, which is taken apart only where it is added.
template <typename T, int kWidth>
struct Columns {
  uint4 word;

  __device__ float operator[](int w) const {
    const int part = w * static_cast<int>(sizeof(T)) / 4;
    const std::uint32_t bits = part == 0   ? word.x
                               : part == 1 ? word.y
                               : part == 2 ? word.z
                                           : word.w;
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(bits);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(w % 2 == 0 ? bits << 16 : bits & 0xffff0000u);
    } else {
      return __half2float(
          __ushort_as_half(static_cast<unsigned short>(w % 2 == 0 ? bits & 0xffffu : bits >> 16)));
    }
  }
};

template <typename T>
struct Columns<T, 1> {
  T word;

  __device__ float operator[](int) const { return to_float(word); }
};

/// Of a row of an expert.
template <typename T, int kWidth>
__device__ Columns<T, kWidth> load_row(const T* from) {
  return {load_once<decltype(Columns<T, kWidth>::word)>(from)};
}

/// What a peer has stored: past the cache of this processor.
template <typename T, int kWidth>
__device__ Columns<T, kWidth> load_stored(const T* from) {
  using Word = decltype(Columns<T, kWidth>::word);
  return {__ldcg(reinterpret_cast<const Word*>(from))};
}

template <typename T, int kWidth>
__device__ Columns<T, kWidth> rounded(const float (&sum)[kWidth]) {
  Columns<T, kWidth> out;
  if constexpr (kWidth == 1) {
    out.word = from_float<T>(sum[0]);
  } else {
    out.word = {word_from<T>(sum),
                word_from<T>(sum + kWidth / 4),
                word_from<T>(sum + kWidth / 2),
                word_from<T>(sum + kWidth * 3 / 4)};
  }
  return out;
}

/// kUnroll: columns of a lane in flight, where half of kMostRows rows or less are added.
template <typename T, int kWidth, int kUnroll>
class Adder {
 public:
  using Values = Columns<T, kWidth>;
  static constexpr int kColumns = kWarp * kWidth;  // of a warp

  __device__ Adder(const SumArgs& args, const Team& team)
      : args_(args), member_(team.member), warps_(team.warps) {}

  /// Rows of a line that are here, the first kMostRows of them in the order of k.
  struct Line {
    std::int64_t line;
    int count;  // more than kMostRows: some are not in `rows`
    const T* rows[kMostRows];
    float weights[kMostRows];
  };

  __device__ Line line_at(std::int64_t line) const {
    Line out{.line = line, .count = 0, .rows = {}, .weights = {}};
    for (int begin = 0; begin < args_.top_k; begin += kWarp) {
      const Choice choice = choice_of(line, begin);
      unsigned int lanes = __ballot_sync(kAllLanes, choice.row >= 0);
      if (begin == 0) {
#pragma unroll
        for (int i = 0; i < kMostRows; ++i) {
          const int from = max(__ffs(static_cast<int>(lanes)) - 1, 0);
          out.rows[i] =
              static_cast<const T*>(args_.rows) +
              max(__shfl_sync(kAllLanes, choice.row, from), std::int64_t{0}) * args_.hidden;
          out.weights[i] = __shfl_sync(kAllLanes, choice.weight, from);
          out.count += lanes != 0;
          lanes &= lanes - 1;
        }
      }
      if (lanes != 0) out.count = kMostRows + 1;  // they are not among `rows`
    }
    return out;
  }

  /// Calls `use(column, sum)` for this lane's columns, `sum` being that of the line's rows,
  /// rounded; `ahead(column, u)` is called beforehand, for loads of the caller, u < kUnroll.
  template <typename Ahead, typename Use>
  __device__ void add(const Line& line, const Ahead& ahead, const Use& use) const {
    if (line.count > kMostRows) {
      add_many(line.line, ahead, use);
    } else if (line.count > kMostRows / 2) {
      add_few<kMostRows, 1>(line, ahead, use);
    } else {
      add_few<kMostRows / 2, kUnroll>(line, ahead, use);
    }
  }

 private:
  /// One choice of a line for each lane.
  struct Choice {
    std::int64_t row;
    float weight;
  };

  __device__ Choice choice_of(std::int64_t line, int begin) const {
    const std::int64_t k = begin + lane_index();
    if (k >= args_.top_k) return {-1, 0.0f};
    const std::int64_t at = line * args_.top_k + k;
    std::int64_t row = args_.recv_map ? args_.recv_map[at] : line;
    if (row >= args_.num_rows) row = -1;
    return {row, args_.recv_weights ? args_.recv_weights[at] : 1.0f};
  }

  template <int kRows, int kAtOnce, typename Ahead, typename Use>
  __device__ void add_few(const Line& line, const Ahead& ahead, const Use& use) const {
    // A warp's columns lie side by side, so that their addresses differ by constants.
    const int hidden = static_cast<int>(args_.hidden);
    for (int column = member_ * kColumns * kAtOnce + lane_index() * kWidth; column < hidden;
         column += warps_ * kColumns * kAtOnce) {
      Values values[kAtOnce][kRows];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int at = column + u * kColumns;
        if (at >= hidden) continue;
        ahead(at, u);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (i < line.count) values[u][i] = load_row<T, kWidth>(line.rows[i] + at);
        }
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int at = column + u * kColumns;
        if (at >= hidden) continue;
        float sum[kWidth] = {};
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (i >= line.count) continue;
#pragma unroll
          for (int w = 0; w < kWidth; ++w) {
            sum[w] += line.weights[i] * values[u][i][w];
          }
        }
        use(at, u, rounded<T>(sum));
      }
    }
  }

  template <typename Ahead, typename Use>
  __device__ void add_many(std::int64_t line, const Ahead& ahead, const Use& use) const {
    const int hidden = static_cast<int>(args_.hidden);
    const int step = warps_ * kColumns;
    const int end = (hidden + step - 1) / step * step;
    for (int column = (member_ * kWarp + lane_index()) * kWidth; column < end; column += step) {
      const bool there = column < hidden;
      float sum[kWidth] = {};
      for (int begin = 0; begin < args_.top_k; begin += kWarp) {
        const Choice choice = choice_of(line, begin);
        unsigned int lanes = __ballot_sync(kAllLanes, choice.row >= 0);
        for (; lanes != 0; lanes &= lanes - 1) {
          const int from = __ffs(static_cast<int>(lanes)) - 1;
          const std::int64_t row = __shfl_sync(kAllLanes, choice.row, from);
          const float weight = __shfl_sync(kAllLanes, choice.weight, from);
          if (!there) continue;
          const auto values =
              load_row<T, kWidth>(static_cast<const T*>(args_.rows) + row * args_.hidden + column);
#pragma unroll
          for (int w = 0; w < kWidth; ++w) sum[w] += weight * values[w];
        }
      }
      if (!there) continue;
      ahead(column, 0);
      use(column, 0, rounded<T>(sum));
    }
  }

  const SumArgs& args_;
  int member_, warps_;
};

template <typename T, int kWidth>
__device__ void send_sums(const SumArgs& args,
                          const PeerView& view,
                          const Arrivals& arrivals,
                          int team_warps) {
  const Team team(team_warps);
  const Adder<T, kWidth, 3> adder(args, team);
  using Values = Columns<T, kWidth>;
  const std::int64_t position = blockIdx.x + std::int64_t{team.index} * args.senders;
  for (ArrivalOrder order(
           view, arrivals, position, std::int64_t{args.senders} * team.per_block(kSumWarps));
       !order.ended();
       order.next()) {
    const Arrival arrival = order.now();
    const auto line = adder.line_at(arrivals.first[arrival.sender] + arrival.index);
    T* to = reinterpret_cast<T*>(view.row(arrival.sender, view.rank(), arrival.index));
    adder.add(
        line,
        [](int, int) {},
        [&](int column, int, Values sum) {
          *reinterpret_cast<decltype(sum.word)*>(to + column) = sum.word;
        });
    team.sync();
    if (team.member == 0 && lane_index() == 0) {
      store_release(view.flag(arrival.sender, view.rank(), arrival.index), view.epoch());
    }
  }
}

/// What a token's visits have left at home: sums of peers, and one that is made here. A lane has a
/// visit; the columns of the first kAhead are loaded beside the rows here.
template <typename T, int kWidth, int kUnroll>
class Sums {
 public:
  using Values = Columns<T, kWidth>;
  static constexpr int kAhead = 2;
  static constexpr int kBatch = 4;  // of further ones

  /// `from`: where the sum of this lane's visit is stored; null: here, or nowhere. `all` and `here`
  /// have a bit for each visit; `table`: [32], of this warp.
  __device__ Sums(const T* from, unsigned int all, unsigned int here, const T** table)
      : all_(all), here_(here), table_(table) {
    __syncwarp();
    table[lane_index()] = from;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kAhead; ++j) first_[j] = table[j];
  }

  __device__ void load(int column, int u) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (first_[j]) stored_[u][j] = load_stored<T, kWidth>(first_[j] + column);
    }
  }

  /// The sum in the order of visits, which is that of ranks.
  __device__ Values add_up(int column, int u, const Values& here) const {
    float sum[kWidth] = {};
#pragma unroll
    for (int j = 0; j < kAhead; ++j) add(sum, first_[j] != nullptr, j, stored_[u][j], here);
    for (int begin = kAhead; all_ >> begin != 0; begin += kBatch) {
      Values values[kBatch];
      bool there[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const T* from = begin + i < kWarp ? table_[begin + i] : nullptr;
        there[i] = from != nullptr;
        if (there[i]) values[i] = load_stored<T, kWidth>(from + column);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) add(sum, there[i], begin + i, values[i], here);
      if (begin + kBatch >= kWarp) break;
    }
    return rounded<T>(sum);
  }

 private:
  __device__ void add(
      float (&sum)[kWidth], bool stored, int j, const Values& far, const Values& here) const {
    const bool is_here = j < kWarp && (here_ >> j & 1);
    if (!stored && !is_here) return;
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      const float made = here[w];
      const float came = far[w];
      sum[w] += is_here ? made : came;
    }
  }

  unsigned int all_, here_;
  const T** table_;
  const T* first_[kAhead];
  Values stored_[kUnroll][kAhead];
};

template <typename T, int kWidth>
__device__ void add_up_homes(const SumArgs& args,
                             const PeerView& view,
                             const std::int64_t* first_sent,
                             const std::int64_t* first_received,
                             int first_block,
                             int team_warps) {
  __shared__ const T* tables[kSumWarps][kWarp];
  const Team team(team_warps);
  constexpr int kUnroll = 2;
  const Adder<T, kWidth, kUnroll> adder(args, team);
  using Values = Columns<T, kWidth>;
  const int num_visits = static_cast<int>(args.num_destinations);
  const int blocks = static_cast<int>(gridDim.x) - first_block;
  for (std::int64_t token = blockIdx.x - first_block + std::int64_t{team.index} * blocks;
       token < args.num_tokens;
       token += std::int64_t{blocks} * team.per_block(kSumWarps)) {
    Visit visit{-1, -1};
    if (lane_index() < num_visits) {
      const std::int32_t row = args.send_map[token * num_visits + lane_index()];
      visit = visit_of_row(row, first_sent, view.num_ranks());
    }
    const unsigned int all = __ballot_sync(kAllLanes, visit.rank >= 0);
    const unsigned int here = __ballot_sync(kAllLanes, visit.rank == view.rank());
    typename Adder<T, kWidth, kUnroll>::Line line{};
    if (here != 0) {
      const int row = __shfl_sync(kAllLanes, visit.row, __ffs(static_cast<int>(here)) - 1);
      line = adder.line_at(first_received[view.rank()] + row);
    }
    bool ok = true;
    const T* from = nullptr;
    if (visit.rank >= 0 && visit.rank != view.rank()) {
      const std::uint32_t* flag = view.flag(view.rank(), visit.rank, visit.row);
      ok = view.wait_for(Wait::kSums, visit.rank, flag);
      from = reinterpret_cast<const T*>(view.row(view.rank(), visit.rank, visit.row));
    }
    if (__any_sync(kAllLanes, !ok)) return;
    Sums<T, kWidth, kUnroll> sums(from, all, here, tables[warp_index()]);
    T* out = static_cast<T*>(args.out) + token * args.hidden;
    adder.add(
        line,
        [&](int column, int u) { sums.load(column, u); },
        [&](int column, int u, const Values& sum) {
          store_once(out + column, sums.add_up(column, u, sum).word);
        });
  }
}

}  // namespace moetuner::transport
