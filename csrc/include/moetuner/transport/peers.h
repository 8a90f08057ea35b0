#pragma once

#include <cstdint>

// Ranks of one node that map each other's memory. Each rank owns a *window* that all of them may
// write, and the same offsets hold in every window:
//
//     [ abort ][ arrived: G ][ counts: 2 x G x (2 + S) ][ flags: 2 x G x R ][ notes: 2 x G x R x 3
//     K ] [ rows: 2 x G x R ]
//
// G ranks, S slots per rank, R rows of one rank at most, K experts per token. The part of sender g
// is written by rank g alone. Operations are numbered; an operation's number, its *epoch*, counts
// on the device, so that replays of a CUDA graph count too. An odd epoch uses one half of the
// window, an even one the other: a rank begins epoch n + 1 only when all have begun epoch n, that
// is, have ended epoch n - 1, whose half it overwrites. Flags hold epochs, and are never cleared.

namespace moetuner::transport {

/// Ranks of a group that shares memory.
constexpr std::int64_t kMaxPeers = 32;
/// Parts of a rank's tokens that are routed side by side.
constexpr std::int64_t kMaxTiles = 64;

/// What a window has room for.
struct WindowShape {
  std::int64_t num_ranks;       // G
  std::int64_t num_rows;        // R
  std::int64_t row_bytes;       // of a row, rounded up to 16
  std::int64_t top_k;           // K
  std::int64_t slots_per_rank;  // S

  bool holds(const WindowShape& other) const {
    return num_ranks == other.num_ranks && num_rows >= other.num_rows &&
           row_bytes >= other.row_bytes && top_k >= other.top_k &&
           slots_per_rank >= other.slots_per_rank;
  }
};

/// Where things are in a window: offsets in bytes.
struct WindowLayout {
  WindowShape shape;
  std::int64_t num_counts;  // of one sender, each beside the epoch that it belongs to
  std::int64_t note_ints;   // of one row
  std::int64_t arrived, counts, flags, notes, rows, bytes;

  static constexpr std::int64_t kCountHead = 2;  // rows, largest number of rows; then choices

  explicit WindowLayout(const WindowShape& wanted) : shape(wanted) {
    const auto align = [](std::int64_t bytes) { return (bytes + 255) / 256 * 256; };
    const std::int64_t senders = 2 * shape.num_ranks;
    const std::int64_t all_rows = senders * shape.num_rows;
    num_counts = kCountHead + shape.slots_per_rank;
    note_ints = (3 * shape.top_k + 3) / 4 * 4;
    arrived = 256;
    counts = align(arrived + 4 * shape.num_ranks);
    flags = align(counts + 8 * senders * num_counts);
    notes = align(flags + 4 * all_rows);
    rows = align(notes + 4 * all_rows * note_ints);
    bytes = align(rows + all_rows * shape.row_bytes);
  }
};

/// What a rank waits for, as an abort word tells it.
enum class Wait : std::uint32_t { kCounts = 1, kRows = 2, kSums = 3, kBlocks = 4, kEnd = 5 };

/// Why nothing goes on: who gave up waiting for whom, and for what. Zero: nothing is wrong.
///
///     [ 1: 4 bits ][ what: 4 ][ who waits: 8 ][ for whom: 8 ]
struct Abort {
  std::uint32_t word;

  Wait what() const { return static_cast<Wait>(word >> 4 & 0xf); }
  int waiting() const { return static_cast<int>(word >> 8 & 0xff); }
  int whom() const { return static_cast<int>(word >> 16 & 0xff); }
};

/// Pinned memory of the host that the device writes.
struct HostBox {
  std::uint32_t abort;
  std::uint32_t ticket;  // of the exact dispatch whose sizes follow
  std::int64_t num_choices;
  std::int64_t largest;  // rows of any rank to any other
  std::int32_t sent[kMaxPeers];
  std::int32_t received[kMaxPeers];
};

/// Memory of the device that no other rank sees; followed by the first row of each sender's choices
/// in each slot, int32 [G, S].
struct Control {
  std::uint32_t epoch;              // of the last operation that has begun
  std::uint32_t begun;              // blocks of it that know so
  std::uint32_t barrier;            // of the blocks of a kernel
  std::uint32_t placed;             // epoch whose [G, S] follow
  std::uint32_t wide;               // not zero: ids were given that int32 does not have
  std::uint32_t ranked[kMaxTiles];  // epoch whose tokens of each tile have their places
};

/// What a kernel needs to know of its peers; passed by value.
struct Peers {
  char* windows[kMaxPeers];  // as mapped here
  Control* control;
  HostBox* host;
  WindowLayout layout;
  std::int64_t timeout_ns;
  int rank;
  int num_ranks;
  int sharing;      // ranks that must find room on this device side by side
  int most_blocks;  // of one kernel; 0: all that there are
};

}  // namespace moetuner::transport
