#pragma once

// Sizes of the kernels that carry rows between ranks.

#include "launch.cuh"
#include "row_ring.cuh"

#include "moetuner/transport/peers.h"

#include <cuda_runtime.h>

#include <algorithm>

namespace moetuner::transport {

constexpr int kThreads = 512;
constexpr int kBlocksPerProcessor = 2;  // of ranks that share a device: no rank's are few then
constexpr int kCarryingWarps = 4;
constexpr int kMostStages = 6;
constexpr std::int64_t kStaticShared = 6144;  // bytes that are enough for what kernels declare

/// What one rank may use at a time. Blocks wait for those of other ranks, so that all of them, of
/// all ranks that share a device, must be resident together.
struct Room {
  std::int64_t blocks, shared_bytes;

  explicit Room(const Peers& peers) {
    const Device& device = Device::current();
    const std::int64_t per_processor = peers.sharing > 1 ? kBlocksPerProcessor : 1;
    blocks = device.processors * per_processor / peers.sharing;
    shared_bytes = device.shared_bytes / per_processor - kStaticShared;
  }
};

/// As many stages, then warps, as shared memory has room for; no stage at all: none has.
inline Carry carry_rows(std::int64_t row_bytes, std::int64_t room) {
  Carry carry{kCarryingWarps, kMostStages, static_cast<int>(row_bytes)};
  while (carry.stages > 3 && carry.shared_bytes() > room) --carry.stages;
  while (carry.warps > 1 && carry.shared_bytes() > room) --carry.warps;
  while (carry.stages > 0 && carry.shared_bytes() > room) --carry.stages;
  return carry;
}

/// Every warp carries words.
inline Carry carry_words(std::int64_t row_bytes) {
  return {kThreads / kWarp, 0, static_cast<int>(row_bytes)};
}

/// Calls `run<Ring>()` for rows that begin at x.
template <typename Run>
void with_ring(const void* x, const void* to, std::int64_t row_bytes, int stages, const Run& run) {
  const bool by_16 = is_multiple(16, x, to, row_bytes) && row_bytes > 0;
  if (by_16 && stages > EngineRing::kKeep && Device::current().is_hopper) {
    run.template operator()<EngineRing>();
  } else if (by_16) {
    run.template operator()<WordRing<uint4>>();
  } else if (is_multiple(4, x, to, row_bytes)) {
    run.template operator()<WordRing<std::uint32_t>>();
  } else {
    run.template operator()<WordRing<std::uint8_t>>();
  }
}

}  // namespace moetuner::transport
