#pragma once

// Flags of what the warps of a block store for peers. A flag may be set when the stores before it
// are there, and to wait for that takes as long as to store some rows. So a warp of its own does
// it: it waits once for all flags that were handed in meanwhile.

#include "bulk_copy.cuh"
#include "peer_waits.cuh"

#include <cuda_runtime.h>

#include <cstdint>

namespace moetuner::transport {

/// In shared memory, for the flags of `kWarps` warps: each warp has some boxes and fills them in
/// turn, and who empties them goes the same way round.
template <int kWarps>
class FlagBoard {
 public:
  static_assert(kWarps <= kWarp);

  /// The whole block calls it, and meets before it uses the rest.
  __device__ void clear() {
    if (static_cast<int>(threadIdx.x) >= kWarps) return;
    for (std::uint64_t& box : boxes_[threadIdx.x]) box = kEmpty;
    given_[threadIdx.x] = 0;
  }

  /// Hands in a flag, behind what this warp's lanes have stored; one lane calls it.
  __device__ void give(std::uint32_t* flag) { put(reinterpret_cast<std::uint64_t>(flag)); }

  /// Says that this warp hands in no more; one lane calls it.
  __device__ void close() { put(kClosed); }

  /// Sets all flags to `epoch` until all warps have closed. One warp calls it.
  __device__ void keep(std::uint32_t epoch) {
    const int warp = lane_index();
    bool open = warp < kWarps;
    std::uint32_t taken = 0;
    while (__any_sync(kAllLanes, open)) {
      std::uint64_t found[kRoom];
      bool more = open, any = false;
#pragma unroll
      for (std::uint64_t& box : found) {
        box = more ? exchange(&boxes_[warp][taken % kRoom], kEmpty) : kEmpty;
        taken += box != kEmpty;
        open = open && box != kClosed;
        more = is_flag(box);
        any = any || more;
      }
      if (!__any_sync(kAllLanes, any)) continue;
      fence_of_system();
#pragma unroll
      for (const std::uint64_t box : found) {
        if (is_flag(box)) store_relaxed(reinterpret_cast<std::uint32_t*>(box), epoch);
      }
    }
  }

 private:
  static constexpr std::uint32_t kRoom = 4;  // flags of a warp that wait
  static constexpr std::uint64_t kEmpty = 0;
  static constexpr std::uint64_t kClosed = 1;  // no flag has this address

  __device__ static bool is_flag(std::uint64_t box) { return box > kClosed; }

  __device__ void put(std::uint64_t word) {
    const int warp = warp_index();
    std::uint64_t* box = &boxes_[warp][given_[warp]++ % kRoom];
    while (compare_exchange(box, kEmpty, word) != kEmpty) {
    }
  }

  // Boxes are read and written by atomic operations alone.
  __device__ static std::uint64_t exchange(std::uint64_t* box, std::uint64_t word) {
    std::uint64_t old;
    asm volatile("atom.acquire.cta.shared.exch.b64 %0, [%1], %2;"
                 : "=l"(old)
                 : "r"(bulk::shared_address(box)), "l"(word)
                 : "memory");
    return old;
  }
  __device__ static std::uint64_t compare_exchange(std::uint64_t* box,
                                                   std::uint64_t wanted,
                                                   std::uint64_t word) {
    std::uint64_t old;
    asm volatile("atom.release.cta.shared.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(old)
                 : "r"(bulk::shared_address(box)), "l"(wanted), "l"(word)
                 : "memory");
    return old;
  }
  /// What this thread has seen is there for all devices, before what it stores from here on.
  __device__ static void fence_of_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

  std::uint64_t boxes_[kWarps][kRoom];
  std::uint32_t given_[kWarps];  // into boxes by each warp, which alone reads it
};

}  // namespace moetuner::transport
