#include "scenario_costs.h"

#include "clones.h"

#include <algorithm>

namespace moetuner {
namespace {

/// Rows of one node's ranks, [m, S] each, and what their maxima are, [S] each.
struct NodeRows {
  const std::int32_t* load;
  const std::int32_t* active;
  const std::int32_t* hits;
  const double* row_scale;
  const double* rank_speed;
  std::int64_t num_ranks;
  std::int64_t size;
  double row_compute;
  double expert_compute;
  double senders;
  double* compute;
  double* peak;
  double* links;
  double* squares;
  double* hits_sum;
  double* least;
};

MOETUNER_CLONES
void find_maxima(const NodeRows& node) {
  const std::int64_t size = node.size;
  for (std::int64_t i = 0; i < node.num_ranks; ++i) {
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
    const double slow = 1.0 / node.rank_speed[i];
    const double arithmetic = slow * node.row_compute;
    const double reading = slow * node.expert_compute;
    const bool first = i == 0;
    for (std::int64_t s = 0; s < size; ++s) {
      const double rows = load[s];
      const double scaled = rows * scale[s];
      const double arrive = hits[s];
      const double by_rows = scaled * arithmetic;
      const double by_experts = active[s] * reading;
      const double seconds = by_rows > by_experts ? by_rows : by_experts;
      const double full = scaled * slow;
      compute[s] = first || seconds > compute[s] ? seconds : compute[s];
      peak[s] = first || full > peak[s] ? full : peak[s];
      most[s] = first || arrive > most[s] ? arrive : most[s];
      least[s] = first || arrive < least[s] ? arrive : least[s];
      squares[s] = (first ? 0.0 : squares[s]) + rows * rows;
      sum[s] = (first ? 0.0 : sum[s]) + arrive;
    }
  }
  // Uniform homes, in rows x ranks: see LayerTally::add_expected.
  const double others = static_cast<double>(node.num_ranks - 1);
  for (std::int64_t s = 0; s < size; ++s) {
    const double ingress = others * node.links[s];
    const double egress = node.hits_sum[s] - node.least[s];
    node.links[s] = node.senders * (ingress > egress ? ingress : egress) * node.row_scale[s];
  }
}

MOETUNER_CLONES
void raise(double* __restrict most, const double* __restrict values, std::int64_t size) {
  for (std::int64_t s = 0; s < size; ++s) most[s] = values[s] > most[s] ? values[s] : most[s];
}

MOETUNER_CLONES
void add(double* __restrict sums, const double* __restrict values, std::int64_t size) {
  for (std::int64_t s = 0; s < size; ++s) sums[s] += values[s];
}

}  // namespace

ScenarioCosts::ScenarioCosts(const SearchArgs& args)
    : args_(args), size_(args.num_scenarios), num_nodes_(args.num_ranks / args.ranks_per_node) {
  const auto ranks = static_cast<std::size_t>(args.num_ranks * size_);
  const auto nodes = static_cast<std::size_t>(num_nodes_ * size_);
  for (auto* array : {&load_, &active_, &hits_}) array->assign(ranks, 0);
  node_hits_.assign(nodes, 0);
  total_.assign(static_cast<std::size_t>(args.num_ranks), 0.0);
  for (auto* array : {&compute_, &peak_, &links_, &squares_, &hits_sum_}) array->assign(nodes, 0);
  scratch_.assign(static_cast<std::size_t>(8 * size_), 0.0);
}

void ScenarioCosts::clear() {
  for (auto* array : {&load_, &active_, &hits_, &node_hits_}) {
    std::fill(array->begin(), array->end(), 0);
  }
  std::fill(total_.begin(), total_.end(), 0.0);
}

void ScenarioCosts::refresh(std::int64_t node) {
  const std::int64_t first = node * args_.ranks_per_node;
  const std::int64_t row = node * size_;
  find_maxima({.load = load(first),
               .active = active(first),
               .hits = hits(first),
               .row_scale = args_.row_scale,
               .rank_speed = args_.rank_speed + first,
               .num_ranks = args_.ranks_per_node,
               .size = size_,
               .row_compute = args_.weights.row_compute,
               .expert_compute = args_.weights.expert_compute,
               .senders = args_.dedup ? static_cast<double>(num_nodes_) : 1.0,
               .compute = compute_.data() + row,
               .peak = peak_.data() + row,
               .links = links_.data() + row,
               .squares = squares_.data() + row,
               .hits_sum = hits_sum_.data() + row,
               .least = scratch_.data()});
}

double ScenarioCosts::price() {
  const SearchWeights& w = args_.weights;
  double* compute = scratch_.data();
  double* peak = compute + size_;
  double* links = peak + size_;
  double* squares = links + size_;
  double* rank_hits = squares + size_;
  std::fill(compute, compute + 5 * size_, 0.0);
  for (std::int64_t node = 0; node < num_nodes_; ++node) {
    const std::int64_t row = node * size_;
    raise(compute, compute_.data() + row, size_);
    raise(peak, peak_.data() + row, size_);
    raise(links, links_.data() + row, size_);
    add(squares, squares_.data() + row, size_);
    add(rank_hits, hits_sum_.data() + row, size_);
  }
  const auto num_ranks = static_cast<double>(args_.num_ranks);
  double seconds = 0.0;
  for (std::int64_t s = 0; s < size_; ++s) {
    std::int64_t all = 0;
    std::int32_t most = 0;
    std::int32_t least = INT32_MAX;
    for (std::int64_t node = 0; node < num_nodes_; ++node) {
      const std::int32_t hits = node_hits_[node * size_ + s];
      all += hits;
      most = std::max(most, hits);
      least = std::min(least, hits);
    }
    const double scale = args_.row_scale[s];
    double rows = 0.0;  // all rows of the scenario are there whoever holds them
    for (std::int64_t rank = 0; w.smooth_variance > 0 && rank < args_.num_ranks; ++rank) {
      rows += load_[rank * size_ + s];
    }
    const double mean = rows / num_ranks;
    const double variance = mean > 0 ? (squares[s] / num_ranks - mean * mean) / mean : 0.0;
    double here = compute[s] + w.smooth_peak * peak[s] + w.smooth_variance * variance * scale;
    if (!args_.gather) {
      const bool between = num_nodes_ > 1 && all > 0;
      const double node_rows = static_cast<double>(std::max(
                                   (args_.num_ranks - args_.ranks_per_node) * std::int64_t{most},
                                   (all - least) * args_.ranks_per_node)) *
                               scale / num_ranks;
      const double rank_rows = links[s] / num_ranks;
      here += std::max(rank_rows * w.rank_row, between ? node_rows * w.node_row : 0.0);
      here += between ? w.node_latency : rank_rows > 0 ? w.rank_latency : 0.0;
      here +=
          scale * (w.smooth_rank_hit * rank_hits[s] + w.smooth_node_hit * static_cast<double>(all));
    }
    seconds += args_.weight[s] * here;
  }
  double fullest = 0.0;
  for (std::int64_t rank = 0; rank < args_.num_ranks; ++rank) {
    fullest = std::max(fullest, total_[rank] / args_.rank_speed[rank]);
  }
  return seconds + w.smooth_pooled * fullest;
}

/// Calls body(array, row) for all that a change of the saved ranks touches.
template <typename Body>
void ScenarioCosts::for_saved(const Body& body) {
  for (int side = 0; side < 2; ++side) {
    const std::int64_t rank = saved_ranks_[side];
    for (auto* array : {&load_, &active_, &hits_}) body(*array, rank);
    body(node_hits_, node_of(rank));
    for (auto* array : {&compute_, &peak_, &links_, &squares_, &hits_sum_}) {
      body(*array, node_of(rank));
    }
  }
}

void ScenarioCosts::save(const std::int64_t (&ranks)[2]) {
  std::copy_n(ranks, 2, saved_ranks_);
  saved_counts_.resize(static_cast<std::size_t>(8 * size_));
  saved_maxima_.resize(static_cast<std::size_t>(10 * size_));
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
