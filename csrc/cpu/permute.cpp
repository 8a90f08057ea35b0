#include "moetuner/ops/permute.h"

#include "moetuner/ops/ids.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace moetuner::cpu {
namespace {

template <typename Id>
std::int64_t expert_of(const PermuteArgs<Id>& args, std::int64_t choice) {
  const std::int32_t id = read_id(args.topk_ids, choice, "permute: topk_ids");
  if (id < 0 || id >= args.num_ids) return -1;
  const std::int64_t expert = args.expert_map ? args.expert_map[id] : id;
  return expert < args.num_experts ? expert : -1;
}

void copy_row(
    const void* from, std::int64_t token, void* to, std::int64_t row, std::int64_t bytes) {
  std::memcpy(static_cast<char*>(to) + row * bytes,
              static_cast<const char*>(from) + token * bytes,
              static_cast<std::size_t>(bytes));
}

/// Zeroes rows [first, last).
void clear_rows(void* rows, std::int64_t first, std::int64_t last, std::int64_t bytes) {
  std::memset(static_cast<char*>(rows) + first * bytes,
              0,
              static_cast<std::size_t>((last - first) * bytes));
}

template <typename Id>
void clear(const PermuteArgs<Id>& args, std::int64_t first, std::int64_t last) {
  if (first >= last || !args.clears) return;
  clear_rows(args.rows, first, last, args.row_bytes);
  if (args.scales) clear_rows(args.row_scales, first, last, args.scale_bytes);
}

}  // namespace

template <typename Id>
void permute(const PermuteArgs<Id>& args) {
  const std::int64_t num_choices = args.num_tokens * args.top_k;
  std::vector<std::int64_t> count(static_cast<std::size_t>(args.num_experts));
  for (std::int64_t i = 0; i < num_choices; ++i) {
    if (const auto expert = expert_of(args, i); expert >= 0) ++count[expert];
  }

  std::vector<std::int64_t> next(count.size());   // first free row of each expert
  std::vector<std::int64_t> limit(count.size());  // end of the rows that it may fill
  std::int64_t end = 0;
  for (std::size_t e = 0; e < count.size(); ++e) {
    next[e] = end;
    const std::int64_t wanted = end + count[e];
    end += args.capacity ? args.capacity
                         : (count[e] + args.alignment - 1) / args.alignment * args.alignment;
    limit[e] = std::min(args.capacity ? end : args.num_rows, args.num_rows);
    const std::int64_t filled = std::min(wanted, limit[e]);
    args.end_offsets[e] =
        static_cast<std::int32_t>(args.capacity ? filled : std::min(end, args.num_rows));
    clear(args, filled, std::min(end, args.num_rows));
    if (args.overflow)
      *args.overflow += static_cast<std::int32_t>(std::min(wanted - filled, count[e]));
  }
  clear(args, end, args.num_rows);

  for (std::int64_t i = 0; i < num_choices; ++i) {
    const auto expert = expert_of(args, i);
    const bool fits = expert >= 0 && next[expert] < limit[expert];
    const std::int64_t row = fits ? next[expert]++ : -1;
    args.row_map[i] = static_cast<std::int32_t>(row);
    if (row < 0) continue;
    copy_row(args.x, i / args.top_k, args.rows, row, args.row_bytes);
    if (args.scales) {
      copy_row(args.scales, i / args.top_k, args.row_scales, row, args.scale_bytes);
    }
  }
  if (args.counters.load) count_routing(args.counters);
}

template void permute(const PermuteArgs<std::int32_t>& args);
template void permute(const PermuteArgs<std::int64_t>& args);

}  // namespace moetuner::cpu
