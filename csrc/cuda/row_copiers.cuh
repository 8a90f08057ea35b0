#pragma once

// Two ways to write a token's row to K places: by Hopper's bulk copy engine through shared memory,
// or by warps through registers. Rows are cut into pieces; every driver of the grid has a sequence
// of them.

#include "bulk_copy.cuh"
#include "launch.cuh"

#include <cuda_runtime.h>

#include <cstdint>

namespace moetuner::cuda {

/// Rows that are copied, in pieces.
struct RowCopy {
  const char* from;  // [T, row_bytes]
  char* to;          // [R, row_bytes]
  std::int64_t row_bytes;
  int pieces;       // of a row
  int piece_bytes;  // of all but a row's last piece

  __device__ std::int64_t token(std::int64_t piece) const { return piece / pieces; }
  __device__ std::int64_t offset(std::int64_t piece) const { return piece % pieces * piece_bytes; }
  __device__ int bytes(std::int64_t piece) const {
    return static_cast<int>(min(std::int64_t{piece_bytes}, row_bytes - offset(piece)));
  }
};

/// Pieces first, first + step, ... < last; of all drivers of a block or of the grid together.
struct Pieces {
  std::int64_t first, last, step;
};

/// Where the rows of a token go: targets[(token - first_token) * top_k + k], -1: nowhere.
struct Targets {
  const std::int32_t* targets;
  std::int64_t first_token;
  int top_k;

  __device__ const std::int32_t* of(std::int64_t token) const {
    return targets + (token - first_token) * top_k;
  }
};

/// How a block copies: some of its warps drive, each with some pieces at a time.
struct Drive {
  int drivers, stages;
};

/// One lane of each driving warp drives the engine, in turns: it fetches some pieces, then stores
/// all of them. Turns of reading and of writing suit the memory better than a steady mix: 5 to 10 %
/// on an H100.
class BulkCopier {
 public:
  static constexpr int kMaxDrivers = 4;
  static constexpr int kMaxStages = 6;
  static constexpr int kMaxPiece = 16384;           // bytes
  static constexpr int kInFlight = 32768;           // bytes of one stage of all drivers
  static constexpr int kBlocksPerSm = 1;            // of this many stages
  static constexpr int kFirstHelper = kMaxDrivers;  // warps from here on are free meanwhile

  /// Shared memory of a block.
  __host__ __device__ static std::int64_t shared_bytes(int piece_bytes, const Drive& drive) {
    return drive.drivers * (std::int64_t{drive.stages} * piece_bytes + 16);
  }

  /// Fetches the first turn at once: it need not be known yet where it goes.
  __device__ BulkCopier(const RowCopy& rows, const Pieces& pieces, const Drive& drive, char* shared)
      : rows_(rows), next_(pieces), num_stages_(drive.stages) {
    drives_ = warp_index() < drive.drivers && lane_index() == 0;
    if (!drives_) return;
    const int bytes = drive.stages * rows.piece_bytes;
    stages_ = shared + warp_index() * bytes;
    barrier_ = reinterpret_cast<std::uint64_t*>(shared + drive.drivers * bytes) + 2 * warp_index();
    bulk::init(barrier_);
    fetch();
  }

  __device__ void copy(const Targets& targets) {
    if (!drives_) return;
    while (next_.first < next_.last) {
      bulk::wait(barrier_, parity_);
      parity_ ^= 1;
      for (int s = 0; s < num_stages_ && next_.first < next_.last; ++s, next_.first += next_.step) {
        store(s, next_.first, targets);
      }
      bulk::wait_stores_read();
      fetch();
    }
  }

 private:
  __device__ char* stage(int index) const { return stages_ + index * rows_.piece_bytes; }

  /// Starts to load the pieces of the next turn.
  __device__ void fetch() {
    std::int64_t bytes = 0;
    int count = 0;
    for (std::int64_t piece = next_.first; count < num_stages_ && piece < next_.last;
         piece += next_.step, ++count) {
      bytes += rows_.bytes(piece);
    }
    if (count == 0) return;
    bulk::expect(barrier_, bytes);
    for (int s = 0; s < count; ++s) {
      const std::int64_t piece = next_.first + s * next_.step;
      const char* from = rows_.from + rows_.token(piece) * rows_.row_bytes + rows_.offset(piece);
      bulk::load(stage(s), from, rows_.bytes(piece), barrier_);
    }
  }

  __device__ void store(int s, std::int64_t piece, const Targets& targets) {
    const std::int32_t* rows = targets.of(rows_.token(piece));
    char* to = rows_.to + rows_.offset(piece);
    for (int k = 0; k < targets.top_k; ++k) {
      if (rows[k] >= 0) bulk::store(to + rows[k] * rows_.row_bytes, stage(s), rows_.bytes(piece));
    }
  }

  RowCopy rows_;
  Pieces next_;
  int num_stages_;
  char* stages_ = nullptr;
  std::uint64_t* barrier_ = nullptr;
  int parity_ = 0;
  bool drives_;
};

/// Every driving warp copies pieces by itself, a Vec per lane at a time.
template <typename Vec>
class VectorCopier {
 public:
  static constexpr int kMaxDrivers = 16;
  static constexpr int kMaxStages = 1;
  static constexpr int kMaxPiece = 16384;  // bytes
  static constexpr int kInFlight = 16 * kMaxPiece;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kFirstHelper = 0;

  __host__ __device__ static std::int64_t shared_bytes(int, const Drive&) { return 0; }

  __device__ VectorCopier(const RowCopy& rows, const Pieces& pieces, const Drive& drive, char*)
      : rows_(rows), pieces_(pieces), drives_(warp_index() < drive.drivers) {}

  __device__ void copy(const Targets& targets) {
    if (!drives_) return;
    for (std::int64_t piece = pieces_.first; piece < pieces_.last; piece += pieces_.step) {
      copy_piece(piece, targets.of(rows_.token(piece)), targets.top_k);
    }
  }

 private:
  __device__ void copy_piece(std::int64_t piece, const std::int32_t* targets, int top_k) {
    constexpr int kUnroll = 4;
    const int count = rows_.bytes(piece) / static_cast<int>(sizeof(Vec));
    const std::int64_t offset = rows_.offset(piece);
    const auto* from =
        reinterpret_cast<const Vec*>(rows_.from + rows_.token(piece) * rows_.row_bytes + offset);
    for (int i = lane_index(); i < count; i += kWarp * kUnroll) {
      Vec values[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * kWarp < count) values[u] = from[i + u * kWarp];
      }
      for (int k = 0; k < top_k; ++k) {
        if (targets[k] < 0) continue;
        auto* to = reinterpret_cast<Vec*>(rows_.to + targets[k] * rows_.row_bytes + offset);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (i + u * kWarp < count) to[i + u * kWarp] = values[u];
        }
      }
    }
  }

  RowCopy rows_;
  Pieces pieces_;
  bool drives_;
};

}  // namespace moetuner::cuda
