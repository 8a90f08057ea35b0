#pragma once

#include "moetuner/ops/ids.h"

#include <cstdint>

struct CUstream_st;  // cudaStream_t, without needing CUDA's headers

// Where the parts of a token that follows its experts go: to the rank of its first expert, or, if
// that is padding, to where the token is. A note travels with each token's row, in numbers that
// float32 has exactly, so that whatever carries floating-point rows carries notes:
//
//     [ key: 4 ][ lane ][ ranks that the token visits, rising, then -1: D ][ 0 ]
//
// A key, home rank and row there, is four times 16 bits. Lane 2 g: the token ends on rank g, where
// its first expert is; lane 2 g + 1: it stays on rank g. T tokens here, K experts of each, E
// experts with R slots at most, G ranks with S slots, D = min(K, G), N rows that arrived, L = N +
// T, W numbers of a note.

namespace moetuner {

constexpr std::int64_t kKeyNumbers = 4;
constexpr std::int64_t kNoteHead = kKeyNumbers + 1;
constexpr std::int64_t kNowhere = INT64_MAX;

template <typename Id>
struct NoteArgs {
  const Id* topk_ids;                  // [T, K]
  const std::int64_t* keys;            // [T, 2]
  const std::int32_t* candidates;      // [E, R]
  const std::int32_t* num_candidates;  // [E]
  float* notes;                        // [T, W]
  std::int64_t num_tokens;
  std::int64_t top_k;
  std::int64_t num_experts;
  std::int64_t max_candidates;
  std::int64_t slots_per_rank;
  std::int64_t num_ranks;
  std::int64_t rank;
  std::int64_t num_destinations;  // D
  std::int64_t width;             // W
};

struct LineArgs {
  const float* arrived;  // [N, W]
  const float* mine;     // [T, W]
  std::int32_t* out;     // [N], lane in which the parts made of a row leave
  std::int32_t* into;    // [L, D], lane and sender, lane * G + rank, of each part of a token that
                       // ends here: lane 0, or 1 where it stays; -1: no more, or it ends elsewhere
  std::int64_t* keys;    // [L, 2]
  std::int64_t* order;   // [L], a number that rises with the key; kNowhere: it ends elsewhere
  std::int32_t* counts;  // [2], added to: tokens that end here, those of them that stayed
  std::int64_t num_arrived;
  std::int64_t num_tokens;
  std::int64_t num_destinations;
  std::int64_t num_ranks;
  std::int64_t rank;
  std::int64_t width;

  std::int64_t num_lines() const { return num_arrived + num_tokens; }
};

/// Rank of a token's k-th choice; -1: padding.
template <typename Id>
MOETUNER_BOTH std::int64_t rank_of_choice(const NoteArgs<Id>& args,
                                          std::int64_t token,
                                          std::int64_t k) {
  const std::int32_t expert =
      read_id(args.topk_ids, token * args.top_k + k, "follow_notes: topk_ids");
  if (expert < 0 || expert >= args.num_experts) return -1;
  const std::int32_t count = args.num_candidates[expert];
  if (count < 1 || count > args.max_candidates) return -1;
  const std::int32_t slot = args.candidates[expert * args.max_candidates + token % count];
  return slot >= 0 && slot < args.num_ranks * args.slots_per_rank ? slot / args.slots_per_rank : -1;
}

template <typename Id>
MOETUNER_BOTH void write_note(const NoteArgs<Id>& args, std::int64_t token) {
  float* note = args.notes + token * args.width;
  for (int i = 0; i < kKeyNumbers; ++i) {
    const std::int64_t part = args.keys[token * 2 + i / 2];
    note[i] = static_cast<float>(part >> (16 * (i % 2)) & 0xffff);
  }
  const std::int64_t first = rank_of_choice(args, token, 0);
  note[kKeyNumbers] = static_cast<float>(first < 0 ? 2 * args.rank + 1 : 2 * first);
  float* visits = note + kNoteHead;
  std::int64_t found = 0;
  for (std::int64_t k = 0; k < args.top_k; ++k) {
    const std::int64_t rank = rank_of_choice(args, token, k);
    if (rank < 0) continue;
    std::int64_t place = 0;
    while (place < found && visits[place] < static_cast<float>(rank)) ++place;
    if (place < found && visits[place] == static_cast<float>(rank)) continue;
    for (std::int64_t i = found++; i > place; --i) visits[i] = visits[i - 1];
    visits[place] = static_cast<float>(rank);
  }
  for (; found < args.num_destinations; ++found) visits[found] = -1.0f;
  for (std::int64_t i = kNoteHead + found; i < args.width; ++i) note[i] = 0.0f;
}

/// Returns whether the token of a line ends here.
MOETUNER_BOTH inline bool read_line(const LineArgs& args, std::int64_t line) {
  const bool came = line < args.num_arrived;
  const float* note =
      came ? args.arrived + line * args.width : args.mine + (line - args.num_arrived) * args.width;
  const auto number = [&](std::int64_t i) { return static_cast<std::int64_t>(note[i]); };
  const std::int64_t lane = number(kKeyNumbers);
  const bool ends = lane == 2 * args.rank + (came ? 0 : 1);
  if (came) args.out[line] = static_cast<std::int32_t>(lane);
  for (std::int64_t d = 0; d < args.num_destinations; ++d) {
    const std::int64_t sender = number(kNoteHead + d);
    args.into[line * args.num_destinations + d] =
        ends && sender >= 0 ? static_cast<std::int32_t>((came ? 0 : args.num_ranks) + sender) : -1;
  }
  const std::int64_t home = number(1) << 16 | number(0);
  const std::int64_t row = number(3) << 16 | number(2);
  args.keys[2 * line] = home;
  args.keys[2 * line + 1] = row;
  args.order[line] = ends ? home << 32 | row : kNowhere;
  return ends;
}

namespace cpu {
template <typename Id>
void write_notes(const NoteArgs<Id>& args);
void read_lines(const LineArgs& args);
}  // namespace cpu

namespace cuda {
/// Both are enqueued on `stream`, one launch each.
template <typename Id>
void write_notes(const NoteArgs<Id>& args, CUstream_st* stream);
void read_lines(const LineArgs& args, CUstream_st* stream);
}  // namespace cuda

}  // namespace moetuner
