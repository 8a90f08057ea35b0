#pragma once

#include "moetuner/planning/inlined.h"
#include "moetuner/planning/wire.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace moetuner {

/// What computing takes on a rank of speed 1, in seconds.
struct ComputeRates {
  double row;     // arithmetic of one (token, expert) row
  double expert;  // reading the weights of one expert that has a row

  double seconds(double rows, double active) const { return rows * row + active * expert; }
  ComputeRates times(double factor) const { return {factor * row, factor * expert}; }
  ComputeRates over(double divisor) const { return {row / divisor, expert / divisor}; }
};

/// What one direction of the exchange takes, in seconds.
struct LinkRates {
  double rank_row;      // one row over a rank's link
  double node_row;      // one row over a node's links together
  double rank_latency;  // once, where rows cross ranks' links alone
  double node_latency;  // once, where any row crosses a node's link
  Hops hops = Hops::kTogether;
};

/// How slow the links of places (ranks or nodes) are: 1 is as `LinkRates` say, less is faster.
/// Empty where all links are alike.
struct LinkFactors {
  std::vector<double> egress;   // of each place
  std::vector<double> ingress;  // the same

  bool alike() const { return egress.empty(); }
  bool fits(std::int64_t places) const {
    return alike() || static_cast<std::int64_t>(egress.size()) == places;
  }
  double out(std::int64_t place) const { return alike() ? 1.0 : egress[place]; }
  double in(std::int64_t place) const { return alike() ? 1.0 : ingress[place]; }
};

/// What computing takes on one rank of speed 1: the larger of two ratios, or a plane that is larger
/// still. Planes are linear functions of rows and active experts; measured curves are made of them.
struct RankCompute {
  ComputeRates rates;
  std::vector<ComputeRates> planes;
  double start = 0.0;  // once, where the rank has a row, whatever its speed
};

/// All that turns the rows of a layer into seconds: `CostModel.rates` makes it.
struct Rates {
  ComputeRates compute;
  LinkRates dispatch;
  LinkRates combine;
  LinkRates both_ways;              // a row, and a latency, of both directions
  double dispatch_share;            // of what a row takes both ways, the way out
  std::vector<double> rank_speeds;  // [G], relative to `compute`
  LinkFactors rank_links = {};      // [G]
  LinkFactors node_links = {};      // [N]
  // Of computing beside `compute`: linear functions of rows and active experts, of which the
  // largest counts where it is larger still. A measured curve is made of them.
  std::vector<ComputeRates> planes = {};
  double layer = 0.0;  // once, where any rank has a row: launches
  // [G], of ranks that compute in ways of their own, in the place of `compute` and `planes`; empty
  // where all are alike.
  std::vector<RankCompute> rank_compute = {};
  // What the slowest rank computes at least, where any rank has a row, beside `layer`: a host that
  // launches what takes less time keeps its GPU waiting.
  double floor = 0.0;

  /// The same for whole nodes in the place of ranks: a node computes as many times faster as it has
  /// ranks, `speeds` [N] beside, and nothing moves inside it. Links of nodes stay as they are; a
  /// way of computing that is a rank's own must be in the speeds.
  Rates of_nodes(std::vector<double> speeds) const;
};

MOETUNER_INLINE inline double larger(double a, double b) { return a > b ? a : b; }

/// Seconds that one rank computes, without planes: rows and weights are worked on side by side.
MOETUNER_INLINE inline double busy_seconds(const ComputeRates& rates, double rows, double active) {
  return larger(rows * rates.row, active * rates.expert);
}

/// Seconds that one rank of speed 1 computes.
inline double busy_seconds(const ComputeRates& rates,
                           const std::vector<ComputeRates>& planes,
                           double rows,
                           double active) {
  double seconds = busy_seconds(rates, rows, active);
  for (const ComputeRates& plane : planes) seconds = larger(seconds, plane.seconds(rows, active));
  return seconds;
}

/// The same of ranks that compute in no way of their own.
inline double busy_seconds(const Rates& rates, double rows, double active) {
  return busy_seconds(rates.compute, rates.planes, rows, active);
}

/// `busy_seconds` as the largest of linear functions, each seconds per row and per active expert.
inline std::vector<ComputeRates> busy_planes(const ComputeRates& rates,
                                             const std::vector<ComputeRates>& more) {
  std::vector<ComputeRates> planes{{rates.row, 0.0}, {0.0, rates.expert}};
  planes.insert(planes.end(), more.begin(), more.end());
  return planes;
}

/// Rows on the busiest of the links of `count` places; those on faster links count for less.
template <typename Count>
double busiest_link(const LinkFactors& links,
                    const Count* egress,
                    const Count* ingress,
                    std::int64_t count) {
  if (links.alike()) {
    const Count out = *std::max_element(egress, egress + count);
    return static_cast<double>(std::max(out, *std::max_element(ingress, ingress + count)));
  }
  double most = 0.0;
  for (std::int64_t i = 0; i < count; ++i) {
    most = larger(most, static_cast<double>(egress[i]) * links.egress[i]);
    most = larger(most, static_cast<double>(ingress[i]) * links.ingress[i]);
  }
  return most;
}

/// What one direction takes beside its latency, from rows on the busiest link of each kind.
inline double transfer_seconds(const LinkRates& rates, double rank_rows, double node_rows) {
  const double inside = rank_rows * rates.rank_row;
  const double between = node_rows * rates.node_row;
  return rates.hops == Hops::kInTurn ? inside + between : larger(inside, between);
}

inline double latency_seconds(const LinkRates& rates, double rank_rows, double node_rows) {
  return node_rows > 0 ? rates.node_latency : rank_rows > 0 ? rates.rank_latency : 0.0;
}

/// The time of a layer. It is written here and nowhere else; docs/objective.md has it in words, and
/// `moetuner.evaluation.reference` a twin to test it with.
class LayerPrice {
 public:
  explicit LayerPrice(Rates rates) : rates_(std::move(rates)) {}

  const Rates& rates() const { return rates_; }
  std::int64_t num_ranks() const { return static_cast<std::int64_t>(rates_.rank_speeds.size()); }
  double speed(std::int64_t rank) const { return rates_.rank_speeds[rank]; }

  /// How many rows a rank computes while one that computes in no way of its own does one.
  double row_speed(std::int64_t rank) const {
    if (rates_.rank_compute.empty() || !(compute_of(rank).row > 0.0)) return speed(rank);
    return speed(rank) * rates_.compute.row / compute_of(rank).row;
  }

  /// Seconds that a rank takes for its rows and its experts that have some.
  double compute(std::int64_t rank, double rows, double active) const {
    const double busy = busy_seconds(compute_of(rank), planes_of(rank), rows, active);
    return busy > 0.0 ? busy / speed(rank) + start_of(rank) : 0.0;
  }

  /// What the slowest rank of a layer takes, and launches: `busy` is its `compute`.
  double with_launches(double busy) const {
    return busy > 0.0 ? larger(busy, rates_.floor) + rates_.layer : busy;
  }

  /// Of a rank of speed 1 that computes as this one does: `Rates::compute`, or its own.
  const ComputeRates& compute_of(std::int64_t rank) const {
    return rates_.rank_compute.empty() ? rates_.compute : rates_.rank_compute[rank].rates;
  }
  const std::vector<ComputeRates>& planes_of(std::int64_t rank) const {
    return rates_.rank_compute.empty() ? rates_.planes : rates_.rank_compute[rank].planes;
  }

  double start_of(std::int64_t rank) const {
    return rates_.rank_compute.empty() ? 0.0 : rates_.rank_compute[rank].start;
  }

  /// `compute_of` the rank at its speed: for loops that cannot afford a division.
  ComputeRates on_rank(std::int64_t rank) const {
    return compute_of(rank).times(1.0 / speed(rank));
  }

  /// Seconds of one direction, from rows on the busiest link of each kind.
  static double exchange(const LinkRates& rates, double rank_rows, double node_rows) {
    return transfer_seconds(rates, rank_rows, node_rows) +
           latency_seconds(rates, rank_rows, node_rows);
  }

  /// The parts follow each other.
  static double total(double compute, double dispatch, double combine) {
    return compute + dispatch + combine;
  }

  /// Of the slowest rank, with launches, for `count` times [G] rows and active experts.
  void slowest_rank(const double* rows,
                    const double* active,
                    std::int64_t count,
                    double* seconds) const;

 private:
  Rates rates_;
};

}  // namespace moetuner
