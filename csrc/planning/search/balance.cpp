#include "moetuner/planning/balance.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace moetuner {

void pack_by_load(const BalanceArgs& args) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(args.num_experts));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return args.load[a] > args.load[b];
  });
  std::vector<double> rank_load(static_cast<std::size_t>(args.num_ranks), 0.0);
  std::vector<std::int64_t> free_slots(static_cast<std::size_t>(args.num_ranks),
                                       args.slots_per_rank);
  for (const std::int64_t expert : order) {
    std::int64_t lightest = -1;
    for (std::int64_t g = 0; g < args.num_ranks; ++g) {
      if (free_slots[g] > 0 && (lightest < 0 || rank_load[g] < rank_load[lightest])) lightest = g;
    }
    args.rank_of[expert] = static_cast<std::int32_t>(lightest);
    rank_load[lightest] += args.load[expert];
    --free_slots[lightest];
  }
}

void refine_by_swaps(const BalanceArgs& args, std::int64_t max_swaps) {
  std::vector<double> rank_load(static_cast<std::size_t>(args.num_ranks), 0.0);
  for (std::int64_t e = 0; e < args.num_experts; ++e) rank_load[args.rank_of[e]] += args.load[e];
  for (std::int64_t swap = 0; swap < max_swaps; ++swap) {
    const auto heaviest = std::max_element(rank_load.begin(), rank_load.end()) - rank_load.begin();
    double best = rank_load[heaviest];
    std::int64_t give = -1;
    std::int64_t take = -1;
    for (std::int64_t e = 0; e < args.num_experts; ++e) {
      if (args.rank_of[e] != heaviest) continue;
      for (std::int64_t f = 0; f < args.num_experts; ++f) {
        const std::int32_t other = args.rank_of[f];
        const double moved = args.load[e] - args.load[f];
        if (other == heaviest || moved <= 0) continue;
        const double worse = std::max(rank_load[heaviest] - moved, rank_load[other] + moved);
        if (worse < best) {
          best = worse;
          give = e;
          take = f;
        }
      }
    }
    if (give < 0) return;
    const double moved = args.load[give] - args.load[take];
    rank_load[heaviest] -= moved;
    rank_load[args.rank_of[take]] += moved;
    std::swap(args.rank_of[give], args.rank_of[take]);
  }
}

}  // namespace moetuner
