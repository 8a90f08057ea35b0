#pragma once

// Sizes of the kernels that carry rows between ranks.

#include "launch.cuh"
#include "moetuner/transport/peers.h"
#include "row_ring.cuh"

#include <cuda_runtime.h>

#include <algorithm>

namespace moetuner::transport {

constexpr int kThreads = 512;
constexpr int kBlocksPerProcessor = 2;      // of ranks that share a device: no rank's are few then
constexpr int kStages = 3;                  // of each warp that carries by the copy engine
constexpr std::int64_t kPieceBytes = 4096;  // that suit the copy engine, or less
constexpr std::int64_t kStaticShared = 6144;  // bytes that are enough for what kernels declare

/// What one rank may use at a time. Blocks wait for those of other ranks, so that all of them, of
/// all ranks that share a device, must be resident together.
struct Room {
  std::int64_t blocks, shared_bytes;

  explicit Room(const Peers& peers) {
    const Device& device = Device::current();
    const std::int64_t per_processor = peers.sharing > 1 ? kBlocksPerProcessor : 1;
    blocks = device.processors * per_processor / peers.sharing;
    if (peers.most_blocks > 0) blocks = std::min<std::int64_t>(blocks, peers.most_blocks);
    shared_bytes = device.shared_bytes / per_processor - kStaticShared;
  }
};

/// Pieces that a row is cut into: 1, 2 or 4.
inline int pieces_of(std::int64_t row_bytes) {
  return row_bytes <= kPieceBytes ? 1 : row_bytes <= 2 * kPieceBytes ? 2 : 4;
}

/// As many warps as shared memory has room for; none: it has none for a row.
inline Carry carry_rows(std::int64_t row_bytes, std::int64_t room) {
  const int pieces = pieces_of(row_bytes);
  const std::int64_t piece_bytes = ceil_div(ceil_div(row_bytes, pieces), 16) * 16;
  Carry carry{
      kThreads / kWarp, kStages, static_cast<int>(row_bytes), static_cast<int>(piece_bytes)};
  while (carry.warps > 0 && carry.shared_bytes() > room) --carry.warps;
  return carry;
}

/// Every warp carries words.
inline Carry carry_words(std::int64_t row_bytes) {
  return {kThreads / kWarp, 0, static_cast<int>(row_bytes), 0};
}

/// Calls `run<Ring>()` for rows that begin at x and go to `to`.
template <typename Run>
void with_ring(const void* x, const void* to, const Carry& carry, const Run& run) {
  const int bytes = carry.row_bytes;
  const bool by_16 = is_multiple(16, x, to, bytes) && bytes > 0;
  if (by_16 && carry.warps > 0 && Device::current().is_hopper) {
    switch (pieces_of(bytes)) {
      case 1:
        return run.template operator()<EngineRing<1>>();
      case 2:
        return run.template operator()<EngineRing<2>>();
      default:
        return run.template operator()<EngineRing<4>>();
    }
  } else if (by_16) {
    run.template operator()<WordRing<uint4>>();
  } else if (is_multiple(4, x, to, bytes)) {
    run.template operator()<WordRing<std::uint32_t>>();
  } else {
    run.template operator()<WordRing<std::uint8_t>>();
  }
}

}  // namespace moetuner::transport
