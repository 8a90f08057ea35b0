#pragma once

// A warp that carries rows, one after another, cut into pieces: each is read once and written to
// some places. By the copy engine, pieces rest in shared memory on their way, some at a time:
//
//     [ piece n + 2: being read ][ piece n + 1: there ][ piece n: being written ] ...
//
// without it, lanes carry words through registers, one row at a time.

#include "bulk_copy.cuh"
#include "launch.cuh"

#include <cuda_runtime.h>

#include <cstdint>

namespace moetuner::transport {

using namespace moetuner::cuda;

/// How the warps of a block carry rows.
struct Carry {
  int warps;   // that carry
  int stages;  // pieces of each at a time
  int row_bytes;
  int piece_bytes;  // of all but a row's last piece

  __host__ __device__ std::int64_t shared_bytes() const {
    return std::int64_t{warps} * stages * (piece_bytes + 8);
  }
};

/// By the copy engine: row bytes and addresses are multiples of 16. kPieces: of a row.
template <int kPiecesOfRow>
class EngineRing {
 public:
  static constexpr bool kEngine = true;
  static constexpr int kPieces = kPiecesOfRow;
  static constexpr int kKeep = 1;           // pieces that are being written while others are read
  static constexpr bool kFlagsLate = true;  // a row's last piece may be on its way after the row

  __device__ EngineRing(const Carry& carry, char* shared)
      : stages_(carry.stages), row_bytes_(carry.row_bytes), bytes_(carry.piece_bytes) {
    const int warp = warp_index();
    pieces_ = shared + static_cast<std::int64_t>(warp) * stages_ * bytes_;
    barriers_ = reinterpret_cast<std::uint64_t*>(shared + static_cast<std::int64_t>(carry.warps) *
                                                              stages_ * bytes_) +
                warp * stages_;
    if (warp < carry.warps && lane_index() == 0) {
      for (int s = 0; s < stages_; ++s) bulk::init(&barriers_[s]);
    }
    __syncwarp();
  }

  /// Whether a further piece can be read while those before it are written.
  __device__ bool has_room() const { return read_ - free_ < stages_; }
  __device__ bool has_pieces() const { return read_ > carried_; }

  /// Begins to read the next piece of the row that begins at `from`.
  __device__ void read(const char* from, int piece) {
    if (lane_index() == 0) {
      std::uint64_t* barrier = &barriers_[read_ % stages_];
      bulk::expect(barrier, bytes_of(piece));
      bulk::load(stage(read_), from + piece * bytes_, bytes_of(piece), barrier);
    }
    ++read_;
  }

  /// Waits for the oldest piece that was not carried yet.
  __device__ void await() { bulk::wait(&barriers_[carried_ % stages_], carried_ / stages_ % 2); }

  /// Writes that piece of a row to the row at `to` of every lane that has one.
  __device__ void write(char* to, int piece) {
    if (to) bulk::store(to + piece * bytes_, stage(carried_), bytes_of(piece));
  }

  /// Done with the piece.
  __device__ void next() {
    bulk::commit();
    bulk::wait_read<kKeep>();
    __syncwarp();
    ++carried_;
    free_ = max(carried_ - kKeep, 0);
  }

  /// After a row: the row before it is written, as this thread sees it.
  __device__ void await_row_before() { bulk::wait_written<kPieces>(); }
  __device__ void finish() { bulk::wait_written<0>(); }

  /// Waits for pieces that will not be carried: a block may not end before they are there.
  __device__ void abandon() {
    for (; has_pieces(); ++carried_) await();
    finish();
  }

 private:
  __device__ int bytes_of(int piece) const {
    return piece < kPieces - 1 ? bytes_ : row_bytes_ - (kPieces - 1) * bytes_;
  }
  __device__ char* stage(int piece) const { return pieces_ + piece % stages_ * bytes_; }

  int stages_, row_bytes_, bytes_;
  char* pieces_;
  std::uint64_t* barriers_;
  int read_ = 0, carried_ = 0, free_ = 0;
};

/// By lanes, a Word each at a time.
template <typename Word>
class WordRing {
 public:
  static constexpr bool kEngine = false;
  static constexpr int kPieces = 1;
  static constexpr bool kFlagsLate = false;

  __device__ WordRing(const Carry& carry, char*) : bytes_(carry.row_bytes) {}

  __device__ bool has_room() const { return from_ == nullptr; }
  __device__ bool has_pieces() const { return from_ != nullptr; }
  __device__ void read(const char* from, int) { from_ = from; }
  __device__ void await() {}

  __device__ void write(char* to, int) {
    unsigned int lanes = __ballot_sync(kAllLanes, to != nullptr);
    for (; lanes != 0; lanes &= lanes - 1) {
      const auto address = __shfl_sync(
          kAllLanes, reinterpret_cast<unsigned long long>(to), __ffs(static_cast<int>(lanes)) - 1);
      copy(reinterpret_cast<Word*>(address));
    }
  }

  __device__ void next() {
    __syncwarp();
    from_ = nullptr;
  }
  __device__ void await_row_before() {}
  __device__ void finish() {}
  __device__ void abandon() {}

 private:
  __device__ void copy(Word* to) const {
    constexpr int kUnroll = 4;
    const int count = bytes_ / static_cast<int>(sizeof(Word));
    const Word* from = reinterpret_cast<const Word*>(from_);
    for (int i = lane_index(); i < count; i += kWarp * kUnroll) {
      Word values[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * kWarp < count) values[u] = __ldcg(from + i + u * kWarp);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * kWarp < count) to[i + u * kWarp] = values[u];
      }
    }
  }

  int bytes_;
  const char* from_ = nullptr;
};

}  // namespace moetuner::transport
