#pragma once

// A warp that carries rows, one after another: each is read once and written to some places. By the
// copy engine, rows rest in shared memory on their way, some at a time:
//
//     [ row n + 2: being read ][ row n + 1: there ][ row n: being written ] ...
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
  int warps;      // that carry
  int stages;     // rows of each at a time
  int row_bytes;

  __host__ __device__ std::int64_t shared_bytes() const {
    return std::int64_t{warps} * stages * (row_bytes + 8);
  }
};

/// By the copy engine: row bytes and addresses are multiples of 16.
class EngineRing {
 public:
  static constexpr bool kEngine = true;
  static constexpr int kKeep = 1;  // rows that are being written while others are read

  __device__ EngineRing(const Carry& carry, char* shared)
      : stages_(carry.stages), bytes_(carry.row_bytes) {
    const int warp = warp_index();
    rows_ = shared + static_cast<std::int64_t>(warp) * stages_ * bytes_;
    barriers_ = reinterpret_cast<std::uint64_t*>(
                    shared + static_cast<std::int64_t>(carry.warps) * stages_ * bytes_) +
                warp * stages_;
    if (warp < carry.warps && lane_index() == 0) {
      for (int s = 0; s < stages_; ++s) bulk::init(&barriers_[s]);
    }
    __syncwarp();
  }

  /// Whether a further row can be read while those before it are written.
  __device__ bool has_room() const { return read_ - written_ < stages_; }
  __device__ bool has_rows() const { return read_ > carried_; }

  /// Begins to read the next row.
  __device__ void read(const char* from) {
    if (lane_index() == 0) {
      std::uint64_t* barrier = &barriers_[read_ % stages_];
      bulk::expect(barrier, bytes_);
      bulk::load(stage(read_), from, bytes_, barrier);
    }
    ++read_;
  }

  /// Waits for the oldest row that was not carried yet.
  __device__ void await() {
    bulk::wait(&barriers_[carried_ % stages_], carried_ / stages_ % 2);
  }

  /// Writes that row to `to` of every lane that has one; may be called again.
  __device__ void write(char* to) {
    if (to) bulk::store(to, stage(carried_), bytes_);
  }

  /// Done with the row; all but kKeep of the rows before are on their way out of shared memory.
  __device__ void next() {
    bulk::commit();
    bulk::wait_read<kKeep>();
    step();
  }

  /// As `next`; all but kKeep rows are written, as this thread sees it.
  __device__ void next_written() {
    bulk::commit();
    bulk::wait_written<kKeep>();
    step();
  }

  __device__ void finish() { bulk::wait_written<0>(); }

  /// Waits for rows that will not be carried: a block may not end before they are there.
  __device__ void abandon() {
    for (; has_rows(); ++carried_) await();
    finish();
  }

 private:
  __device__ void step() {
    __syncwarp();
    ++carried_;
    written_ = max(carried_ - kKeep, 0);
  }
  __device__ char* stage(int row) const { return rows_ + row % stages_ * bytes_; }

  int stages_, bytes_;
  char* rows_;
  std::uint64_t* barriers_;
  int read_ = 0, carried_ = 0, written_ = 0;
};

/// By lanes, a Word each at a time.
template <typename Word>
class WordRing {
 public:
  static constexpr bool kEngine = false;
  static constexpr int kKeep = 0;

  __device__ WordRing(const Carry& carry, char*) : bytes_(carry.row_bytes) {}

  __device__ bool has_room() const { return from_ == nullptr; }
  __device__ bool has_rows() const { return from_ != nullptr; }
  __device__ void read(const char* from) { from_ = from; }
  __device__ void await() {}

  __device__ void write(char* to) {
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
  __device__ void next_written() {
    __threadfence_system();
    next();
  }
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
