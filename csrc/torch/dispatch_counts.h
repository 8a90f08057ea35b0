#pragma once

#include "dispatch_forward.h"

// The one look of the exact form at counts on the host.

namespace moetuner {

/// Rows to and from each place of each hop, and (token, expert) rows here.
struct Counts {
  std::vector<at::Tensor> splits;  // of each hop int64 [2, places], on the CPU
  std::int64_t num_choices;
};

/// What gateways must know before rows come: how many come, and what they will pass on. Returns
/// int32 [2, N], rows to and from each node, and [R, 2], rows and choices to each rank of this one.
inline std::pair<at::Tensor, at::Tensor> count_between(const Communicator& wire,
                                                       const at::Tensor& to_ranks,
                                                       const at::Tensor& node_ends) {
  const at::Tensor rows = node_ends.diff(1, 0, node_ends.new_zeros({1})).unsqueeze(1);
  const at::Tensor sent = at::cat({to_ranks.reshape({wire.num_ranks(), -1}), rows}, 1);
  const at::Tensor received = wire.exchange(sent, {}, {});
  const std::int64_t width = sent.size(1) - 1;
  return {at::stack({sent.select(1, width), received.select(1, width)}),
          received.narrow(1, 0, width).sum({0}, false, at::kInt).view({-1, 2})};
}

/// Of the first of two hops alone. The host waits once.
inline Counts count_crossing(const Path& path,
                             const at::Tensor& counts,
                             const at::Tensor& node_ends) {
  const at::Tensor between = count_between(path.between_nodes(), counts[0], node_ends).first;
  return {.splits = {between.cpu().to(at::kLong).contiguous()}, .num_choices = 0};
}

/// `counts` int32 [2, G, 2] has, in its first half, rows to each rank and choices there; the other
/// half is room. `place_ends` int32 [places] are the ends of rows on the first wire. The host waits
/// once.
inline Counts count_rows(const Path& path, const at::Tensor& counts, const at::Tensor& place_ends) {
  at::Tensor between, inside = counts;  // [2, N], [2, places, 2]
  if (path.crosses_nodes()) {
    at::Tensor here;
    std::tie(between, here) = count_between(path.between_nodes(), counts[0], place_ends);
    inside = at::stack({here, here});
  }
  path.last().exchange_into(inside[1], inside[0], {}, {});
  const auto table = [](const at::Tensor& on_host) { return on_host.to(at::kLong).contiguous(); };
  Counts out;
  if (path.crosses_nodes()) {
    const at::Tensor all = at::cat({between.flatten(), inside.flatten()}).cpu();
    out.splits.push_back(table(all.narrow(0, 0, between.numel()).view_as(between)));
    inside = all.narrow(0, between.numel(), inside.numel()).view_as(inside);
  } else {
    inside = inside.cpu();
  }
  out.splits.push_back(table(inside.select(2, 0)));
  out.num_choices = inside[1].select(1, 1).sum().item<std::int64_t>();
  return out;
}

}  // namespace moetuner
