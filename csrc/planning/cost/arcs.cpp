#include "moetuner/planning/arcs.h"

#include "moetuner/planning/parallel.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

namespace moetuner {
namespace {

/// Rows between ranks of two states, and their cost under any renaming.
class Step {
 public:
  explicit Step(const ArcArgs& args)
      : args_(args),
        num_nodes_(args.num_ranks / args.ranks_per_node),
        rank_(static_cast<std::size_t>(args.num_ranks * args.num_ranks)),
        node_(static_cast<std::size_t>(args.num_ranks * num_nodes_)),
        out_(static_cast<std::size_t>(args.num_ranks)),
        in_(static_cast<std::size_t>(args.num_ranks)),
        egress_(static_cast<std::size_t>(args.num_ranks)),
        ingress_(static_cast<std::size_t>(args.num_ranks)),
        node_egress_(static_cast<std::size_t>(num_nodes_)),
        node_ingress_(static_cast<std::size_t>(num_nodes_)),
        node_of_(static_cast<std::size_t>(args.num_ranks)) {
    for (std::int64_t r = 0; r < args.num_ranks; ++r) node_of_[r] = r / args.ranks_per_node;
  }

  /// Rows from each rank of state `here` to each rank and node of state `there`, before renaming.
  void load(std::int64_t batch, std::int64_t here, std::int64_t there) {
    const std::int64_t ranks = args_.num_ranks;
    std::fill(rank_.begin(), rank_.end(), 0.0);
    std::fill(node_.begin(), node_.end(), 0.0);
    const std::int64_t base = (batch * args_.num_states + there) * args_.num_experts;
    for (std::int64_t f = 0; f < args_.num_experts; ++f) {
      const std::int64_t home = args_.rank_of[here * args_.num_experts + f];
      add(args_.rank_rows + (base + f) * ranks, ranks, &rank_[home * ranks]);
      if (uses_nodes()) {
        add(args_.node_rows + (base + f) * num_nodes_, num_nodes_, &node_[home * num_nodes_]);
      }
    }
    std::fill(out_.begin(), out_.end(), 0.0);
    std::fill(in_.begin(), in_.end(), 0.0);
    for (std::int64_t home = 0; home < ranks; ++home) {
      for (std::int64_t r = 0; r < ranks; ++r) {
        out_[home] += rank_[home * ranks + r];
        in_[r] += rank_[home * ranks + r];
      }
    }
  }

  /// At most the cost of every renaming that sends nodes where `rename` does.
  double floor(const std::int32_t* rename) {
    if (!uses_nodes() || args_.crossing == Crossing::kRing) return 0.0;
    between_nodes(rename);
    return LayerPrice::exchange(args_.dispatch, 0.0, busiest_node());
  }

  double cost(const std::int32_t* rename) {
    switch (args_.cost) {
      case ArcCost::kExchange:
        return exchange(rename);
      case ArcCost::kSlowestPair:
        return slowest_pair(rename);
      case ArcCost::kRemote:
        return remote(rename);
    }
    throw std::invalid_argument("cheapest_arcs: no such cost");
  }

 private:
  double exchange(const std::int32_t* rename) {
    if (args_.crossing == Crossing::kRing) {
      ring();
    } else if (num_nodes_ == 1) {
      one_node(rename);
    } else {
      between_nodes(rename);
      inside_nodes(rename);
    }
    const double rank =
        busiest_link(args_.rank_links, egress_.data(), ingress_.data(), args_.num_ranks);
    return LayerPrice::exchange(args_.dispatch, rank, busiest_node());
  }

  static void add(const double* rows, std::int64_t count, double* sums) {
    for (std::int64_t i = 0; i < count; ++i) sums[i] += rows[i];
  }

  double busiest_node() const {
    return busiest_link(args_.node_links, node_egress_.data(), node_ingress_.data(), num_nodes_);
  }

  bool uses_nodes() const { return num_nodes_ > 1 && args_.cost == ArcCost::kExchange; }

  /// Every row leaves its home and enters its rank, but for those that stay.
  void one_node(const std::int32_t* rename) {
    const std::int64_t ranks = args_.num_ranks;
    for (std::int64_t r = 0; r < ranks; ++r) {
      const std::int64_t rank = rename[r];
      const double stays = rank_[rank * ranks + r];
      egress_[rank] = out_[rank] - stays;
      ingress_[rank] = in_[r] - stays;
    }
  }

  /// From each rank to its next go the rows of all homes but that one; all ranks get each row.
  void ring() {
    const std::int64_t ranks = args_.num_ranks;
    for (auto* links : {&egress_, &ingress_, &node_egress_, &node_ingress_}) {
      std::fill(links->begin(), links->end(), 0.0);
    }
    double all = 0.0;
    for (std::int64_t home = 0; home < ranks; ++home) all += rank_[home * ranks];
    for (std::int64_t rank = 0; rank < ranks; ++rank) {
      const std::int64_t next = rank + 1 < ranks ? rank + 1 : 0;
      const double rows = all - rank_[next * ranks];
      const std::int64_t from = node_of_[rank];
      const std::int64_t to = node_of_[next];
      (from == to ? egress_[rank] : node_egress_[from]) += rows;
      (from == to ? ingress_[next] : node_ingress_[to]) += rows;
    }
  }

  void between_nodes(const std::int32_t* rename) {
    std::fill(node_egress_.begin(), node_egress_.end(), 0.0);
    std::fill(node_ingress_.begin(), node_ingress_.end(), 0.0);
    for (std::int64_t n = 0; n < num_nodes_; ++n) {
      const std::int64_t node = node_of_[rename[n * args_.ranks_per_node]];
      for (std::int64_t home = 0; home < args_.num_ranks; ++home) {
        if (node_of_[home] == node) continue;
        node_egress_[node_of_[home]] += node_[home * num_nodes_ + n];
        node_ingress_[node] += node_[home * num_nodes_ + n];
      }
    }
  }

  void inside_nodes(const std::int32_t* rename) {
    std::fill(egress_.begin(), egress_.end(), 0.0);
    std::fill(ingress_.begin(), ingress_.end(), 0.0);
    const std::int64_t per_node = args_.ranks_per_node;
    const bool gateway = args_.crossing == Crossing::kGateway;
    for (std::int64_t home = 0; home < args_.num_ranks; ++home) {
      const std::int64_t local = home - node_of_[home] * per_node;
      for (std::int64_t r = 0; r < args_.num_ranks; ++r) {
        const std::int64_t rank = rename[r];
        if (!gateway && node_of_[rank] != node_of_[home]) continue;
        const std::int64_t sender = gateway ? node_of_[rank] * per_node + local : home;
        if (rank == sender) continue;
        egress_[sender] += rank_[home * args_.num_ranks + r];
        ingress_[rank] += rank_[home * args_.num_ranks + r];
      }
    }
  }

  double slowest_pair(const std::int32_t* rename) const {
    double slowest = 0.0;
    for (std::int64_t home = 0; home < args_.num_ranks; ++home) {
      for (std::int64_t r = 0; r < args_.num_ranks; ++r) {
        slowest = std::max(slowest,
                           rank_[home * args_.num_ranks + r] *
                               args_.link_seconds[home * args_.num_ranks + rename[r]]);
      }
    }
    return slowest;
  }

  double remote(const std::int32_t* rename) const {
    double rows = 0.0;
    for (std::int64_t r = 0; r < args_.num_ranks; ++r) {
      rows += in_[r] - rank_[rename[r] * args_.num_ranks + r];
    }
    return rows;
  }

  const ArcArgs& args_;
  std::int64_t num_nodes_;
  std::vector<double> rank_;      // [home, rank of the next layer before renaming]
  std::vector<double> node_;      // [home, node of the next layer before renaming]
  std::vector<double> out_, in_;  // sums of rank_ over ranks, over homes
  std::vector<double> egress_, ingress_, node_egress_, node_ingress_;
  std::vector<std::int64_t> node_of_;
};

/// Whether two renamings send nodes to the same nodes.
bool same_nodes(const ArcArgs& args, const std::int32_t* a, const std::int32_t* b) {
  for (std::int64_t r = 0; r < args.num_ranks; r += args.ranks_per_node) {
    if (a[r] / args.ranks_per_node != b[r] / args.ranks_per_node) return false;
  }
  return true;
}

}  // namespace

void cheapest_arcs(const ArcArgs& args) {
  const auto renames = static_cast<std::size_t>(args.num_renames);
  parallel_for(args.num_states, args.num_threads, [&](std::int64_t here) {
    std::vector<Step> steps(static_cast<std::size_t>(args.num_batches), Step(args));
    for (std::int64_t there = 0; there < args.num_states; ++there) {
      for (std::int64_t b = 0; b < args.num_batches; ++b) steps[b].load(b, here, there);
      double best = std::numeric_limits<double>::infinity();
      double floor = 0.0;  // of renamings that send nodes where the current one does
      std::int32_t chosen = 0;
      for (std::size_t a = 0; a < renames; ++a) {
        const std::int32_t* rename = args.rename + a * args.num_ranks;
        if (a == 0 || !same_nodes(args, rename, rename - args.num_ranks)) {
          floor = 0.0;
          for (std::int64_t b = 0; b < args.num_batches; ++b) {
            floor += args.weight[b] * steps[b].floor(rename);
          }
        }
        if (best <= floor) continue;
        double total = 0.0;
        for (std::int64_t b = 0; b < args.num_batches && total < best; ++b) {
          total += args.weight[b] * steps[b].cost(rename);
        }
        if (total < best) {
          best = total;
          chosen = static_cast<std::int32_t>(a);
        }
      }
      args.best[here * args.num_states + there] = best;
      args.renamed[here * args.num_states + there] = chosen;
    }
  });
}

}  // namespace moetuner
