#pragma once

// Flags between ranks, and waits that end. Whoever waits too long writes who waited for whom into
// the abort word of every rank's window; from then on no wait waits, and the host is told.

#include "launch.cuh"
#include "moetuner/transport/peers.h"

#include <cuda_runtime.h>

#include <cstdint>

namespace moetuner::transport {

using namespace moetuner::cuda;

__device__ inline std::uint32_t load_acquire(const std::uint32_t* flag) {
  std::uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ inline std::uint32_t load_relaxed(const std::uint32_t* flag) {
  std::uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

/// Makes visible, before the flag, what this thread has written or seen written.
__device__ inline void store_release(std::uint32_t* flag, std::uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ inline void store_relaxed(std::uint32_t* flag, std::uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ inline uint2 load_relaxed(const uint2* pair) {
  uint2 value;
  asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "l"(pair)
               : "memory");
  return value;
}

__device__ inline void store_relaxed(uint2* pair, uint2 value) {
  asm volatile(
      "st.relaxed.sys.global.v2.u32 [%0], {%1, %2};" ::"l"(pair), "r"(value.x), "r"(value.y)
      : "memory");
}

/// As `store_release`, for this device alone.
__device__ inline void store_release_here(std::uint32_t* flag, std::uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

/// What others have written by the copy engine or by stores may be read by the copy engine.
__device__ inline void fence_copy_engine() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

__device__ inline std::uint64_t nanoseconds() {
  std::uint64_t value;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
  return value;
}

/// Whether a flag that only grows has come to `epoch`; epochs wrap around.
__device__ inline bool reached(std::uint32_t flag, std::uint32_t epoch) {
  return static_cast<std::int32_t>(flag - epoch) >= 0;
}

/// How much longer a rank waits for its own blocks than for other ranks: the block that waits for a
/// rank gives up first, and says for whom. Less than the host's grace.
constexpr std::uint64_t kLaterNanoseconds = 1'000'000'000;

/// One operation as a kernel sees it: its half of each window.
class PeerView {
 public:
  __device__ PeerView(const Peers& peers, std::uint32_t epoch) : peers_(peers), epoch_(epoch) {}

  __device__ std::uint32_t epoch() const { return epoch_; }
  __device__ int rank() const { return peers_.rank; }
  __device__ int num_ranks() const { return peers_.num_ranks; }

  __device__ std::uint32_t* abort_word(int rank) const {
    return reinterpret_cast<std::uint32_t*>(peers_.windows[rank]);
  }
  /// The epoch that `sender` has begun, as `rank` sees it.
  __device__ std::uint32_t* arrived(int rank, int sender) const {
    return reinterpret_cast<std::uint32_t*>(peers_.windows[rank] + peers_.layout.arrived) + sender;
  }
  /// Counts of a sender, each beside the epoch that it belongs to: they need no flag.
  __device__ uint2* counts(int rank, int sender) const {
    return reinterpret_cast<uint2*>(peers_.windows[rank] + peers_.layout.counts) +
           part(sender) * peers_.layout.num_counts;
  }
  __device__ std::uint32_t* flag(int rank, int sender, std::int64_t row) const {
    return reinterpret_cast<std::uint32_t*>(peers_.windows[rank] + peers_.layout.flags) +
           part(sender) * peers_.layout.shape.num_rows + row;
  }
  __device__ std::int32_t* note(int rank, int sender, std::int64_t row) const {
    return reinterpret_cast<std::int32_t*>(peers_.windows[rank] + peers_.layout.notes) +
           (part(sender) * peers_.layout.shape.num_rows + row) * peers_.layout.note_ints;
  }
  __device__ char* row(int rank, int sender, std::int64_t row) const {
    return peers_.windows[rank] + peers_.layout.rows +
           (part(sender) * peers_.layout.shape.num_rows + row) * peers_.layout.shape.row_bytes;
  }

  /// Returns whether `ready()` came true before somebody gave up. The waiting threads of a warp
  /// come here together.
  template <typename Ready>
  __device__ bool wait(Wait what, int whom, const Ready& ready) const {
    if (ready()) return true;
    const std::uint64_t begin = nanoseconds();
    const std::uint64_t most = static_cast<std::uint64_t>(peers_.timeout_ns) +
                               (what == Wait::kBlocks ? kLaterNanoseconds : 0);
    for (int turn = 0;; ++turn) {
      if (ready()) return true;
      if (turn % 64 != 63) continue;
      if (const std::uint32_t word = load_relaxed(abort_word(rank())); word != 0) {
        tell_host(word);
        return false;
      }
      if (nanoseconds() - begin > most) {
        give_up(1u | static_cast<std::uint32_t>(what) << 4 |
                static_cast<std::uint32_t>(rank()) << 8 | static_cast<std::uint32_t>(whom) << 16);
        return false;
      }
    }
  }

  /// As `wait`, for a flag of `whom`.
  __device__ bool wait_for(Wait what, int whom, const std::uint32_t* flag) const {
    return wait(what, whom, [&] { return reached(load_acquire(flag), epoch_); });
  }

  /// Whether somebody has given up; then the host is told.
  __device__ bool aborted() const {
    const std::uint32_t word = load_relaxed(abort_word(rank()));
    if (word != 0) tell_host(word);
    return word != 0;
  }

 private:
  __device__ std::int64_t part(int sender) const {
    return (epoch_ & 1) * peers_.num_ranks + sender;
  }

  __device__ void tell_host(std::uint32_t word) const { store_relaxed(&peers_.host->abort, word); }

  /// The first word of each window stays.
  __device__ void give_up(std::uint32_t word) const {
    const std::uint32_t earlier = atomicCAS_system(abort_word(rank()), 0u, word);
    tell_host(earlier != 0 ? earlier : word);
    if (earlier != 0) return;
    for (int g = 0; g < num_ranks(); ++g) {
      if (g != rank()) store_relaxed(abort_word(g), word);
    }
  }

  const Peers& peers_;
  std::uint32_t epoch_;
};

/// The epoch of the operation that begins with this kernel; the kernels ahead are complete. The
/// whole block calls it.
__device__ inline std::uint32_t next_epoch(const Peers& peers) {
  __shared__ std::uint32_t epoch;
  Control* control = peers.control;
  if (threadIdx.x == 0) epoch = load_relaxed(&control->epoch) + 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(&control->begun, 1u) == gridDim.x - 1) {  // all blocks have read it
      control->begun = 0;
      store_release(&control->epoch, epoch);
    }
  }
  return epoch;
}

/// The epoch of an operation that has begun with an earlier kernel.
__device__ inline std::uint32_t this_epoch(const Peers& peers) {
  return load_acquire(&peers.control->epoch);
}

/// Waits for all blocks of the grid, all of which are resident. The whole block calls it; false:
/// somebody gave up.
__device__ inline bool wait_for_blocks(const Peers& peers, const PeerView& view) {
  __shared__ bool ok;
  __syncthreads();
  if (threadIdx.x == 0) {
    // The top bit flips when the last one comes; the other bits then are zero again.
    const std::uint32_t add = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
    __threadfence();
    const std::uint32_t before = atomicAdd(&peers.control->barrier, add);
    ok = view.wait(Wait::kBlocks, view.rank(), [&] {
      return ((load_acquire(&peers.control->barrier) ^ before) & 0x80000000u) != 0;
    });
    __threadfence();
  }
  __syncthreads();
  return ok;
}

/// Tells all ranks that this one has begun. One block calls it, with all its threads.
__device__ inline void begin_operation(const PeerView& view) {
  const int g = static_cast<int>(threadIdx.x);
  if (g < view.num_ranks()) store_release(view.arrived(g, view.rank()), view.epoch());
}

/// Waits until all ranks have begun, which this one may not leave behind. One block calls it, with
/// all its threads.
__device__ inline void end_operation(const PeerView& view) {
  const int g = static_cast<int>(threadIdx.x);
  if (g < view.num_ranks()) view.wait_for(Wait::kEnd, g, view.arrived(view.rank(), g));
}

/// First rows of what goes to or comes from each rank: sums of the counts, or equal shares. Filled
/// by the whole block into shared memory, [G + 1].
__device__ inline void first_rows(const std::int32_t* counts,
                                  std::int64_t capacity,
                                  int num_ranks,
                                  std::int64_t* first) {
  if (threadIdx.x == 0) {
    std::int64_t sum = 0;
    for (int g = 0; g < num_ranks; ++g) {
      first[g] = sum;
      sum += capacity > 0 ? capacity : counts[g];
    }
    first[num_ranks] = sum;
  }
}

}  // namespace moetuner::transport
