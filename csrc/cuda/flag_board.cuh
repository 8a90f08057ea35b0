#pragma once

// Flags of what the warps of a block store for peers. A flag may be set when the stores before it
// are there, and to wait for that takes as long as to store some rows. So a warp of its own does
// it: it waits once for all flags that were handed in meanwhile.

#include "bulk_copy.cuh"
#include "peer_waits.cuh"

#include <cuda_runtime.h>

#include <cstdint>

namespace moetuner::transport {

/// In shared memory, for the flags of `kWarps` warps.
template <int kWarps>
class FlagBoard {
 public:
  static_assert(kWarps <= kWarp);

  /// The whole block calls it, and meets before it uses the rest.
  __device__ void clear() {
    if (static_cast<int>(threadIdx.x) < kWarps) given_[threadIdx.x] = set_[threadIdx.x] = 0;
  }

  /// Hands in a flag, behind what this warp's lanes have stored; one lane calls it.
  __device__ void give(std::uint32_t* flag) {
    const int warp = warp_index();
    const std::uint32_t count = given_[warp];
    while (count - load_acquire_shared(&set_[warp]) >= kRoom) {
    }
    flags_[warp][count % kRoom] = flag;
    store_release_shared(&given_[warp], count + 1);
  }

  /// Says that this warp hands in no more; one lane calls it.
  __device__ void close() {
    store_release_shared(&given_[warp_index()], given_[warp_index()] | kClosed);
  }

  /// Sets all flags to `epoch` until all warps have closed. One warp calls it.
  __device__ void keep(std::uint32_t epoch) {
    const int warp = lane_index();
    bool open = warp < kWarps;
    std::uint32_t done = 0;
    while (__any_sync(kAllLanes, open)) {
      const std::uint32_t given = open ? load_acquire_shared(&given_[warp]) : done;
      const std::uint32_t count = given & ~kClosed;
      if (__any_sync(kAllLanes, count != done)) {
        fence_of_system();
        if (count != done) {
          for (; done != count; ++done) store_relaxed(flags_[warp][done % kRoom], epoch);
          store_release_shared(&set_[warp], done);
        }
      }
      if ((given & kClosed) != 0) open = false;
    }
  }

 private:
  static constexpr std::uint32_t kRoom = 4;  // flags of a warp that wait
  static constexpr std::uint32_t kClosed = 0x80000000u;

  __device__ static std::uint32_t load_acquire_shared(const std::uint32_t* word) {
    std::uint32_t value;
    asm volatile("ld.acquire.cta.shared.u32 %0, [%1];"
                 : "=r"(value)
                 : "r"(bulk::shared_address(word))
                 : "memory");
    return value;
  }
  __device__ static void store_release_shared(std::uint32_t* word, std::uint32_t value) {
    asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(bulk::shared_address(word)), "r"(value)
                 : "memory");
  }
  /// What this thread has seen is there for all devices, before what it stores from here on.
  __device__ static void fence_of_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

  std::uint32_t* flags_[kWarps][kRoom];
  std::uint32_t given_[kWarps];  // by each warp so far; the top bit: no more come
  std::uint32_t set_[kWarps];    // of these
};

}  // namespace moetuner::transport
