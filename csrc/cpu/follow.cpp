#include "moetuner/ops/follow.h"

namespace moetuner::cpu {

template <typename Id>
void write_notes(const NoteArgs<Id>& args) {
  for (std::int64_t token = 0; token < args.num_tokens; ++token) write_note(args, token);
}

void read_lines(const LineArgs& args) {
  for (std::int64_t line = 0; line < args.num_lines(); ++line) {
    const bool ends = read_line(args, line);
    args.counts[0] += ends;
    args.counts[1] += ends && line >= args.num_arrived;
  }
}

template void write_notes(const NoteArgs<std::int32_t>& args);
template void write_notes(const NoteArgs<std::int64_t>& args);

}  // namespace moetuner::cpu
