#include "instance.h"

#include "planning/search/random_draws.h"

#include <algorithm>

namespace moetuner {
namespace {

/// Outputs of a tally, in the order of their fields.
struct Counts {
  std::vector<std::int64_t> slot_rows;
  std::vector<std::int64_t> ranks[4];  // dispatch egress and ingress, then the way back
  std::vector<std::int64_t> nodes[4];
  std::vector<std::int64_t> tokens[4];
  std::vector<std::int64_t> traffic;
};

TallyArgs with_outputs(TallyArgs args, Counts& counts) {
  const auto cells = [&](std::int64_t width) {
    return static_cast<std::size_t>(args.num_groups * args.num_layers * width);
  };
  counts.slot_rows.assign(cells(args.num_slots), 0);
  counts.traffic.assign(static_cast<std::size_t>(args.num_layers * args.num_ranks * args.num_ranks),
                        0);
  for (auto& ranks : counts.ranks) ranks.assign(cells(args.num_ranks), 0);
  for (auto& nodes : counts.nodes) nodes.assign(cells(args.num_ranks / args.ranks_per_node), 0);
  for (auto& tokens : counts.tokens) tokens.assign(cells(1), 0);
  args.slot_rows = counts.slot_rows.data();
  args.rank_egress = counts.ranks[0].data();
  args.rank_ingress = counts.ranks[1].data();
  args.return_rank_egress = counts.ranks[2].data();
  args.return_rank_ingress = counts.ranks[3].data();
  args.node_egress = counts.nodes[0].data();
  args.node_ingress = counts.nodes[1].data();
  args.return_node_egress = counts.nodes[2].data();
  args.return_node_ingress = counts.nodes[3].data();
  args.distinct_ranks = counts.tokens[0].data();
  args.distinct_nodes = counts.tokens[1].data();
  args.remote_ranks = counts.tokens[2].data();
  args.remote_nodes = counts.tokens[3].data();
  args.traffic = counts.traffic.data();
  return args;
}

double busiest(const LinkFactors& factors,
               const std::vector<std::int64_t> (&links)[4],
               int way,
               std::int64_t cell,
               std::int64_t width) {
  double most = 0.0;
  for (std::int64_t i = 0; i < width; ++i) {
    const std::int64_t at = cell * width + i;
    most = std::max(most, static_cast<double>(links[2 * way][at]) * factors.out(i));
    most = std::max(most, static_cast<double>(links[2 * way + 1][at]) * factors.in(i));
  }
  return most;
}

}  // namespace

void Instance::draw() {
  RandomDraws random(seed);
  constexpr std::int64_t kThemes = 3;
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    token.push_back(t);
    home.push_back(static_cast<std::int32_t>(random.below(num_ranks)));
    const std::int64_t theme = random.below(kThemes);
    for (std::int64_t l = 0; l < num_layers; ++l) {
      std::vector<std::int16_t> chosen;
      while (static_cast<std::int64_t>(chosen.size()) < top_k) {
        const bool own = random.unit() < 0.8;
        const std::int64_t e =
            own ? theme + kThemes * random.below(num_experts / kThemes) : random.below(num_experts);
        const auto id = static_cast<std::int16_t>(e);
        if (std::find(chosen.begin(), chosen.end(), id) == chosen.end()) chosen.push_back(id);
      }
      if (padding && random.unit() < 0.1) chosen[random.below(top_k)] = -1;
      topk_ids.insert(topk_ids.end(), chosen.begin(), chosen.end());
    }
  }
  load.assign(static_cast<std::size_t>(num_scenarios * num_layers * num_experts), 0);
  for (std::int64_t s = 0; s <= num_scenarios; ++s) {
    scenario_begin.push_back(s * num_tokens / num_scenarios);
    if (s == num_scenarios) break;
    row_scale.push_back(1.0);
    weight.push_back(1.0 / static_cast<double>(num_scenarios));
    for (std::int64_t t = s * num_tokens / num_scenarios; t < (s + 1) * num_tokens / num_scenarios;
         ++t) {
      for (std::int64_t i = 0; i < num_layers * top_k; ++i) {
        const std::int16_t id = topk_ids[t * num_layers * top_k + i];
        if (id >= 0) ++load[(s * num_layers + i / top_k) * num_experts + id];
      }
    }
  }
  for (const std::int32_t rows : load) active.push_back(rows > 0);
}

Rates Instance::rates(WireRules wire) const {
  const LinkRates dispatch{3.0, 5.0, 0.5, 2.0, wire.hops};
  const LinkRates combine{6.0, 10.0, 0.5, 2.0, wire.hops};
  const LinkRates both_ways{9.0, 15.0, 1.0, 4.0, wire.hops};
  Rates found{{2.0, 7.0}, dispatch, combine, both_ways, 1.0 / 3.0, rank_speeds};
  if (uneven) {
    const auto slow = [](std::int64_t places, double first) {
      std::vector<double> factors;
      for (std::int64_t i = 0; i < places; ++i) {
        factors.push_back(first / static_cast<double>(1 + i));
      }
      return factors;
    };
    const std::int64_t nodes = num_ranks / ranks_per_node;
    found.rank_links = {slow(num_ranks, 0.8), slow(num_ranks, 1.0)};
    found.node_links = {slow(nodes, 1.0), slow(nodes, 0.6)};
    found.planes = {{1.5, 3.0}, {0.5, 6.5}};
    found.layer = 0.75;
  }
  return found;
}

SearchProblem Instance::problem(WireRules wire, Homes homes, bool with_home) const {
  return {.topk_ids = topk_ids.data(),
          .scenario_begin = scenario_begin.data(),
          .load = load.data(),
          .active = active.data(),
          .row_scale = row_scale.data(),
          .weight = weight.data(),
          .token = token.data(),
          .home = with_home ? home.data() : nullptr,
          .num_tokens = num_tokens,
          .num_layers = num_layers,
          .top_k = top_k,
          .num_experts = num_experts,
          .num_ranks = num_ranks,
          .ranks_per_node = ranks_per_node,
          .num_scenarios = num_scenarios,
          .wire = wire,
          .follow = homes == Homes::kFollow,
          .price = LayerPrice(rates(wire)),
          .smoothing = {},
          .stay_rank = nullptr,
          .move_seconds = 0.0,
          .replica_rule = ReplicaRule::kMoetuner,
          .replicas = false};
}

std::vector<std::int32_t> Instance::dealt(std::int64_t spare) const {
  std::vector<std::int32_t> ranks;
  for (std::int64_t l = 0; l < num_layers; ++l) {
    for (std::int64_t p = 0; p < num_experts + spare * num_ranks; ++p) {
      ranks.push_back(static_cast<std::int32_t>(p % num_ranks));
    }
  }
  return ranks;
}

std::vector<std::int32_t> Instance::slots_of(const std::vector<std::int32_t>& ranks) const {
  const auto num_slots = static_cast<std::int64_t>(ranks.size()) / num_layers;
  const std::int64_t per_rank = num_slots / num_ranks;
  std::vector<std::int32_t> slots(ranks.size(), -1);
  for (std::int64_t l = 0; l < num_layers; ++l) {
    std::vector<std::int64_t> used(static_cast<std::size_t>(num_ranks), 0);
    for (std::int64_t e = 0; e < num_experts; ++e) {
      const std::int32_t rank = ranks[l * num_slots + e];
      slots[l * num_slots + rank * per_rank + used[rank]++] = static_cast<std::int32_t>(e);
    }
  }
  return slots;
}

std::vector<double> Instance::priced(const std::vector<std::int32_t>& slots,
                                     WireRules wire,
                                     Homes homes,
                                     ReplicaRule rule) const {
  std::vector<std::int32_t> group;
  for (std::int64_t s = 0; s < num_scenarios; ++s) {
    for (std::int64_t t = scenario_begin[s]; t < scenario_begin[s + 1]; ++t) {
      group.push_back(static_cast<std::int32_t>(s));
    }
  }
  const std::vector<std::int16_t> home_rank(home.begin(), home.end());
  TallyArgs args{};
  args.topk_ids = topk_ids.data();
  args.slot_experts = slots.data();
  args.home_rank = home_rank.data();
  args.group = group.data();
  args.num_tokens = num_tokens;
  args.num_layers = num_layers;
  args.top_k = top_k;
  args.num_experts = num_experts;
  args.num_slots = static_cast<std::int64_t>(slots.size()) / num_layers;
  args.num_ranks = num_ranks;
  args.ranks_per_node = ranks_per_node;
  args.num_groups = num_scenarios;
  args.wire = wire;
  args.homes = homes;
  args.replica_rule = rule;
  args.num_threads = 2;
  Counts counts;
  args = with_outputs(args, counts);
  tally_routing(args);

  const LayerPrice price(rates(wire));
  const auto unit = static_cast<double>(tally_scale(homes, num_ranks));
  const std::int64_t per_rank = args.num_slots / num_ranks;
  const bool moves = wire.rows != Rows::kToAll;  // a search leaves those links out
  std::vector<double> seconds(static_cast<std::size_t>(num_layers), 0.0);
  for (std::int64_t s = 0; s < num_scenarios; ++s) {
    for (std::int64_t l = 0; l < num_layers; ++l) {
      const std::int64_t cell = s * num_layers + l;
      double here = 0.0;
      for (std::int64_t rank = 0; rank < num_ranks; ++rank) {
        double rows = 0.0;
        double experts = 0.0;
        for (std::int64_t i = 0; i < per_rank; ++i) {
          const std::int64_t count = counts.slot_rows[cell * args.num_slots + rank * per_rank + i];
          rows += static_cast<double>(count) / unit;
          experts += count > 0;
        }
        here = std::max(here, price.compute(rank, rows, experts));
      }
      here = price.with_launches(here);
      for (int way = 0; way < 2 && moves; ++way) {
        const LinkRates& rates = way == 0 ? price.rates().dispatch : price.rates().combine;
        const double ranks =
            busiest(price.rates().rank_links, counts.ranks, way, cell, num_ranks) / unit;
        const std::int64_t num_nodes = num_ranks / ranks_per_node;
        const double nodes =
            busiest(price.rates().node_links, counts.nodes, way, cell, num_nodes) / unit;
        here += LayerPrice::exchange(rates, ranks, nodes);
      }
      seconds[l] += weight[s] * here;
    }
  }
  return seconds;
}

SearchOptions short_search(std::int64_t proposals, std::int64_t sweeps, int num_threads) {
  return {.proposals = proposals,
          .sweeps = sweeps,
          .start_temperature = 0.5,
          .end_temperature = 0.01,
          .seed = 7,
          .num_threads = num_threads,
          .seconds = 1e6};
}

}  // namespace moetuner
