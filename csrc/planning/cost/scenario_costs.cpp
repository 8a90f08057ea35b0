#include "planning/cost/scenario_costs.h"

#include "planning/vectorized.h"

#include <algorithm>

namespace moetuner {
namespace {

MOETUNER_INLINE inline double smaller(double a, double b) { return a < b ? a : b; }

/// Rows of one node's ranks, [m, S] each, and what their maxima are, [S] each.
struct NodeRows {
  const std::int32_t* load;
  const std::int32_t* active;
  const std::int32_t* hits;
  const double* row_scale;
  const LayerPrice* price;
  std::int64_t first;  // its first rank
  std::int64_t num_ranks;
  std::int64_t size;
  double* compute;
  double* peak;
  double* links;
  double* squares;
  double* hits_sum;
  double* least;
};

/// Raises `compute` to what rank i of the node takes where it starts later than others.
void start_later(const NodeRows& node, std::int64_t i, double start) {
  const std::int64_t rank = node.first + i;
  const double slow = 1.0 / node.price->speed(rank);
  for (const ComputeRates& plane :
       busy_planes(node.price->compute_of(rank), node.price->planes_of(rank))) {
    const ComputeRates here = plane.times(slow);
    for (std::int64_t s = 0; s < node.size; ++s) {
      const std::int64_t at = i * node.size + s;
      const double rows = node.load[at] * node.row_scale[s];
      if (node.active[at] == 0 && rows == 0.0) continue;
      node.compute[s] = larger(node.compute[s], here.seconds(rows, node.active[at]) + start);
    }
  }
}

void find_maxima(const NodeRows& node) {
  const std::int64_t size = node.size;
  std::fill_n(node.compute, size, 0.0);
  std::fill_n(node.peak, size, 0.0);
  std::fill_n(node.links, size, 0.0);
  std::fill_n(node.least, size, 1e300);
  std::fill_n(node.squares, size, 0.0);
  std::fill_n(node.hits_sum, size, 0.0);
  for (std::int64_t i = 0; i < node.num_ranks; ++i) {
    const double slow = 1.0 / node.price->speed(node.first + i);
    const double per_row = 1.0 / node.price->row_speed(node.first + i);
    const ComputeRates rates = node.price->on_rank(node.first + i);
    vectorized([&node, rates, size, i, per_row]() MOETUNER_INLINE {
      const std::int32_t* __restrict load = node.load + i * size;
      const std::int32_t* __restrict active = node.active + i * size;
      const std::int32_t* __restrict hits = node.hits + i * size;
      const double* __restrict scale = node.row_scale;
      double* __restrict compute = node.compute;
      double* __restrict peak = node.peak;
      double* __restrict squares = node.squares;
      double* __restrict sum = node.hits_sum;
      double* __restrict most = node.links;
      double* __restrict least = node.least;
      for (std::int64_t s = 0; s < size; ++s) {
        const double rows = load[s];
        squares[s] += rows * rows;
      }
      for (std::int64_t s = 0; s < size; ++s) {
        compute[s] = larger(compute[s], busy_seconds(rates, load[s] * scale[s], active[s]));
      }
      for (std::int64_t s = 0; s < size; ++s) {
        peak[s] = larger(load[s] * scale[s] * per_row, peak[s]);
      }
      for (std::int64_t s = 0; s < size; ++s) most[s] = larger(hits[s], most[s]);
      for (std::int64_t s = 0; s < size; ++s) least[s] = smaller(hits[s], least[s]);
      for (std::int64_t s = 0; s < size; ++s) sum[s] += hits[s];
    });
    for (const ComputeRates& plane : node.price->planes_of(node.first + i)) {
      const ComputeRates here = plane.times(slow);
      vectorized([&node, here, size, i]() MOETUNER_INLINE {
        const std::int32_t* __restrict load = node.load + i * size;
        const std::int32_t* __restrict active = node.active + i * size;
        const double* __restrict scale = node.row_scale;
        double* __restrict compute = node.compute;
        for (std::int64_t s = 0; s < size; ++s) {
          compute[s] = larger(compute[s], here.seconds(load[s] * scale[s], active[s]));
        }
      });
    }
    const double start = node.price->start_of(node.first + i);
    if (start > 0.0) start_later(node, i, start);
  }
}

void raise(double* __restrict most, const double* __restrict values, std::int64_t size) {
  vectorized([=]() MOETUNER_INLINE {
    for (std::int64_t s = 0; s < size; ++s) most[s] = values[s] > most[s] ? values[s] : most[s];
  });
}

void add(double* __restrict sums, const double* __restrict values, std::int64_t size) {
  vectorized([=]() MOETUNER_INLINE {
    for (std::int64_t s = 0; s < size; ++s) sums[s] += values[s];
  });
}

void add_extremes(
    double* sums, double* most, double* least, const std::int32_t* counts, std::int64_t size) {
  vectorized([=]() MOETUNER_INLINE {
    for (std::int64_t s = 0; s < size; ++s) sums[s] += counts[s];
    for (std::int64_t s = 0; s < size; ++s) most[s] = larger(counts[s], most[s]);
    for (std::int64_t s = 0; s < size; ++s) least[s] = smaller(counts[s], least[s]);
  });
}

}  // namespace

ScenarioCosts::ScenarioCosts(const SearchProblem& problem)
    : problem_(problem),
      size_(problem.num_scenarios),
      num_nodes_(problem.num_ranks / problem.ranks_per_node),
      unlike_(!problem.price.rates().rank_links.alike() ||
              !problem.price.rates().node_links.alike()) {
  const auto ranks = static_cast<std::size_t>(problem.num_ranks * size_);
  const auto nodes = static_cast<std::size_t>(num_nodes_ * size_);
  for (auto* array : {&load_, &active_, &hits_}) array->assign(ranks, 0);
  node_hits_.assign(nodes, 0);
  total_.assign(static_cast<std::size_t>(problem.num_ranks), 0.0);
  for (auto* array : {&compute_, &peak_, &links_, &back_, &squares_, &hits_sum_}) {
    array->assign(nodes, 0);
  }
  scratch_.assign(static_cast<std::size_t>(8 * size_), 0.0);
}

void ScenarioCosts::clear() {
  for (auto* array : {&load_, &active_, &hits_, &node_hits_}) {
    std::fill(array->begin(), array->end(), 0);
  }
  std::fill(total_.begin(), total_.end(), 0.0);
}

void ScenarioCosts::refresh_all() {
  mean_load_.assign(static_cast<std::size_t>(size_), 0.0);
  for (std::int64_t rank = 0; rank < problem_.num_ranks; ++rank) {
    for (std::int64_t s = 0; s < size_; ++s) mean_load_[s] += load(rank)[s];
  }
  for (double& rows : mean_load_) rows /= static_cast<double>(problem_.num_ranks);
  for (std::int64_t node = 0; node < num_nodes_; ++node) refresh(node);
}

void ScenarioCosts::refresh(std::int64_t node) {
  const std::int64_t first = node * problem_.ranks_per_node;
  const std::int64_t row = node * size_;
  find_maxima({.load = load(first),
               .active = active(first),
               .hits = hits(first),
               .row_scale = problem_.row_scale,
               .price = &problem_.price,
               .first = first,
               .num_ranks = problem_.ranks_per_node,
               .size = size_,
               .compute = compute_.data() + row,
               .peak = peak_.data() + row,
               .links = links_.data() + row,
               .squares = squares_.data() + row,
               .hits_sum = hits_sum_.data() + row,
               .least = scratch_.data()});
  if (unlike_) {
    refresh_unlike(node);
    return;
  }
  double* links = links_.data() + row;
  if (problem_.home != nullptr) {
    for (std::int64_t s = 0; s < size_; ++s) {
      links[s] *= problem_.row_scale[s] * static_cast<double>(problem_.num_ranks);
    }
    return;
  }
  // Uniform homes, in rows x ranks: see LayerTally::add_expected.
  const double senders =
      problem_.wire.crossing == Crossing::kGateway ? static_cast<double>(num_nodes_) : 1.0;
  const double others = static_cast<double>(problem_.ranks_per_node - 1);
  for (std::int64_t s = 0; s < size_; ++s) {
    const double ingress = others * links[s];
    const double egress = hits_sum_[row + s] - scratch_[s];
    links[s] = senders * std::max(ingress, egress) * problem_.row_scale[s];
  }
}

/// `refresh` where links differ: seconds decide which is the busiest, and each way has its own.
void ScenarioCosts::refresh_unlike(std::int64_t node) {
  const LinkFactors& factors = problem_.price.rates().rank_links;
  const std::int64_t row = node * size_;
  const bool homes = problem_.home != nullptr;
  const bool gateway = problem_.wire.crossing == Crossing::kGateway;
  const double senders = homes     ? static_cast<double>(problem_.num_ranks)
                         : gateway ? static_cast<double>(num_nodes_)
                                   : 1.0;
  const double others = homes ? 1.0 : static_cast<double>(problem_.ranks_per_node - 1);
  double* links = links_.data() + row;
  double* back = back_.data() + row;
  std::fill_n(links, size_, 0.0);
  std::fill_n(back, size_, 0.0);
  const std::int64_t first = node * problem_.ranks_per_node;
  for (std::int64_t rank = first; rank < first + problem_.ranks_per_node; ++rank) {
    for (std::int64_t s = 0; s < size_; ++s) {
      const double scale = senders * problem_.row_scale[s];
      const double in = others * hits(rank)[s] * scale;
      const double out = homes ? 0.0 : (hits_sum_[row + s] - hits(rank)[s]) * scale;
      links[s] = larger(links[s], larger(in * factors.in(rank), out * factors.out(rank)));
      back[s] = larger(back[s], larger(in * factors.out(rank), out * factors.in(rank)));
    }
  }
}

/// Both ways of an exchange where links differ; `sum` are rows that arrive at all nodes, `unit`
/// rows of a count.
double ScenarioCosts::exchange_unlike(std::int64_t s, double sum, double unit) const {
  const Rates& rates = problem_.price.rates();
  const bool homes = problem_.home != nullptr;
  const auto num_ranks = static_cast<double>(problem_.num_ranks);
  const auto per_node = static_cast<double>(problem_.ranks_per_node);
  double inside[2] = {0.0, 0.0};
  double between[2] = {0.0, 0.0};
  for (std::int64_t node = 0; node < num_nodes_; ++node) {
    inside[0] = larger(inside[0], links_[node * size_ + s]);
    inside[1] = larger(inside[1], back_[node * size_ + s]);
    const double hits = node_hits_[node * size_ + s];
    const double in = homes ? hits : (num_ranks - per_node) / num_ranks * hits;
    const double out = homes ? 0.0 : (sum - hits) * per_node / num_ranks;
    const double there = rates.node_links.in(node);
    const double away = rates.node_links.out(node);
    between[0] = larger(between[0], larger(in * there, out * away));
    between[1] = larger(between[1], larger(in * away, out * there));
  }
  const double shares[2] = {rates.dispatch_share, 1.0 - rates.dispatch_share};
  double seconds = 0.0;
  for (int way = 0; way < 2; ++way) {
    const double rank = inside[way] * unit / num_ranks;
    const double node = num_nodes_ > 1 ? between[way] * problem_.row_scale[s] * unit : 0.0;
    seconds += shares[way] * transfer_seconds(rates.both_ways, rank, node);
    seconds += 0.5 * latency_seconds(rates.both_ways, rank, node);
  }
  return seconds;
}

double ScenarioCosts::price() {
  double* compute = scratch_.data();
  double* peak = compute + size_;
  double* links = peak + size_;
  double* squares = links + size_;
  double* rank_hits = squares + size_;
  double* node_hits = rank_hits + size_;
  double* most = node_hits + size_;
  double* least = most + size_;
  std::fill(compute, least, 0.0);
  std::fill_n(least, size_, 1e300);
  for (std::int64_t node = 0; node < num_nodes_; ++node) {
    const std::int64_t row = node * size_;
    raise(compute, compute_.data() + row, size_);
    raise(peak, peak_.data() + row, size_);
    raise(links, links_.data() + row, size_);
    add(squares, squares_.data() + row, size_);
    add(rank_hits, hits_sum_.data() + row, size_);
    add_extremes(node_hits, most, least, node_hits_.data() + row, size_);
  }
  const Smoothing& smoothing = problem_.smoothing;
  const LinkRates& both_ways = problem_.price.rates().both_ways;
  const auto num_ranks = static_cast<double>(problem_.num_ranks);
  const auto per_node = static_cast<double>(problem_.ranks_per_node);
  const double away = num_ranks - per_node;
  const bool homes = problem_.home != nullptr;
  const bool moves = problem_.wire.rows != Rows::kToAll;  // else no placement changes the links
  const double unit = homes ? 1.0 / kLinkRow : 1.0;
  double seconds = 0.0;
  for (std::int64_t s = 0; s < size_; ++s) {
    const double scale = problem_.row_scale[s];
    const double link_scale = scale * unit;
    // A rank's rows have the same mean whoever holds what.
    const double mean = mean_load_[s];
    const double variance = mean > 0 ? (squares[s] / num_ranks - mean * mean) / mean : 0.0;
    double here = problem_.price.with_launches(compute[s]) + smoothing.peak * peak[s] +
                  smoothing.variance * variance * scale;
    if (moves && unlike_) {
      here += exchange_unlike(s, node_hits[s], unit);
      here += link_scale *
              (smoothing.rank_copies * rank_hits[s] + smoothing.node_copies * node_hits[s]);
    } else if (moves) {
      const double node_rows =
          (homes ? most[s]
                 : std::max(away * most[s], (node_hits[s] - least[s]) * per_node) / num_ranks) *
          link_scale;
      const double between = num_nodes_ > 1 ? node_rows : 0.0;
      const double inside = links[s] * unit / num_ranks;
      here += transfer_seconds(both_ways, inside, between);
      here += latency_seconds(both_ways, inside, between);
      here += link_scale *
              (smoothing.rank_copies * rank_hits[s] + smoothing.node_copies * node_hits[s]);
    }
    seconds += problem_.weight[s] * here;
  }
  double fullest = 0.0;
  for (std::int64_t rank = 0; rank < problem_.num_ranks; ++rank) {
    fullest = std::max(fullest, total_[rank] / problem_.price.row_speed(rank));
  }
  return seconds + smoothing.pooled * fullest;
}

/// Calls body(array, row) for all that a change of the saved ranks touches.
template <typename Body>
void ScenarioCosts::for_saved(const Body& body) {
  for (int side = 0; side < 2; ++side) {
    const std::int64_t rank = saved_ranks_[side];
    for (auto* array : {&load_, &active_, &hits_}) body(*array, rank);
    body(node_hits_, node_of(rank));
    for (auto* array : {&compute_, &peak_, &links_, &back_, &squares_, &hits_sum_}) {
      body(*array, node_of(rank));
    }
  }
}

void ScenarioCosts::save(const std::int64_t (&ranks)[2]) {
  std::copy_n(ranks, 2, saved_ranks_);
  saved_counts_.resize(static_cast<std::size_t>(8 * size_));
  saved_maxima_.resize(static_cast<std::size_t>(12 * size_));
  std::int32_t* counts = saved_counts_.data();
  double* maxima = saved_maxima_.data();
  for_saved([&](auto& array, std::int64_t row) {
    const auto from = array.begin() + row * size_;
    if constexpr (std::is_same_v<std::decay_t<decltype(array)>, std::vector<double>>) {
      maxima = std::copy_n(from, size_, maxima);
    } else {
      counts = std::copy_n(from, size_, counts);
    }
  });
  for (int side = 0; side < 2; ++side) saved_total_[side] = total_[saved_ranks_[side]];
}

void ScenarioCosts::restore() {
  const std::int32_t* counts = saved_counts_.data();
  const double* maxima = saved_maxima_.data();
  for_saved([&](auto& array, std::int64_t row) {
    const auto to = array.begin() + row * size_;
    if constexpr (std::is_same_v<std::decay_t<decltype(array)>, std::vector<double>>) {
      std::copy_n(maxima, size_, to);
      maxima += size_;
    } else {
      std::copy_n(counts, size_, to);
      counts += size_;
    }
  });
  for (int side = 0; side < 2; ++side) total_[saved_ranks_[side]] = saved_total_[side];
}

}  // namespace moetuner
