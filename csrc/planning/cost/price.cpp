#include "moetuner/planning/price.h"

namespace moetuner {

Rates Rates::of_nodes(std::vector<double> speeds) const {
  const double per_node = static_cast<double>(rank_speeds.size() / speeds.size());
  Rates nodes = *this;
  nodes.compute = compute.over(per_node);
  for (ComputeRates& plane : nodes.planes) plane = plane.over(per_node);
  for (LinkRates* link : {&nodes.dispatch, &nodes.combine, &nodes.both_ways}) {
    link->rank_row = 0.0;
    link->rank_latency = 0.0;
  }
  nodes.rank_speeds = std::move(speeds);
  nodes.rank_links = {};
  nodes.rank_compute = {};
  return nodes;
}

void LayerPrice::slowest_rank(const double* rows,
                              const double* active,
                              std::int64_t count,
                              double* seconds) const {
  for (std::int64_t i = 0; i < count; ++i) {
    double slowest = 0.0;
    for (std::int64_t rank = 0; rank < num_ranks(); ++rank, ++rows, ++active) {
      slowest = larger(slowest, compute(rank, *rows, *active));
    }
    seconds[i] = with_launches(slowest);
  }
}

}  // namespace moetuner
