#include "dispatch_forward.h"

#include "dispatch_counts.h"
#include "dispatch_device.h"
#include "peer_exchange.h"
#include "ranges.h"

#include <algorithm>

#ifdef MOETUNER_WITH_CUDA
#include <c10/core/DeviceGuard.h>
#endif

// The plain form sends what there is, which takes one look at the counts on the host; the fixed one
// sends shares of equal size and looks at nothing.
//
//     route     slots of each token, and the places it leaves for
//
//     pack      rows to the wire by place, one for each (token, place): `permute`, places as
//               experts
//
//     send      rows, and the slots and weights of their tokens
//
//     spread    where rows crossed between nodes: the ranks that each visits there; then pack and
//               send again
//
//     place     slots that are here, and rows to them: `permute` again
//
// Over peer memory, what crossed between nodes is a dispatch of its own inside the node instead.

namespace moetuner {
namespace {

using Inputs = DispatchInputs;

/// Rows of tokens, and the slots and weights that travel with them.
struct Travelling {
  at::Tensor rows, travel;
};

std::int32_t* int_data(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<std::int32_t>() : nullptr;
}

struct Routed {
  at::Tensor destinations, travel, counts, blank, overflow, counted;
};

/// `counts` [2, G, 2] in the exact form; `blank` [places * capacity, 2 K] and `overflow` in the
/// fixed.
template <typename Device>
Routed route(const Inputs& in, const Sizes& sizes) {
  const Range range("route");
  const auto int32 = in.x.options().dtype(at::kInt);
  const std::int64_t num_tokens = in.topk_ids.size(0);
  const std::int64_t top_k = in.topk_ids.size(1);
  const std::int64_t num_ranks = sizes.num_ranks;
  const std::int64_t num_destinations = std::min(top_k, sizes.num_places());
  const std::int64_t num_counted =
      1 + num_ranks + sizes.num_nodes() + num_ranks * in.slots_per_rank + sizes.num_passed_on();
  Routed out;
  out.destinations = at::empty({num_tokens, num_destinations}, int32);
  out.travel = at::empty({num_tokens, 2 * top_k}, int32);
  out.overflow = at::empty({in.fixed() ? 1 : 0}, int32);
  out.counted = at::zeros({in.counts ? num_counted : 0}, int32.dtype(at::kLong));
  if (in.fixed()) {
    out.blank = at::empty({sizes.num_places() * sizes.capacity, 2 * top_k}, int32);
  } else {
    out.counts = at::zeros({2, num_ranks, 2}, int32);
  }
  with_id_type(in.topk_ids, [&]<typename Id>() {
    Device::route(RouteArgs<Id>{
        .topk_ids = in.topk_ids.const_data_ptr<Id>(),
        .weights = in.weights.const_data_ptr<float>(),
        .candidates = in.candidates.const_data_ptr<std::int32_t>(),
        .num_candidates = in.num_candidates.const_data_ptr<std::int32_t>(),
        .destinations = int_data(out.destinations),
        .travel = int_data(out.travel),
        .counts = int_data(out.counts),
        .counters = in.counts ? out.counted.mutable_data_ptr<std::int64_t>() : nullptr,
        .blank = int_data(out.blank),
        .overflow = in.fixed() ? int_data(out.overflow) : nullptr,
        .blank_size = in.fixed() ? out.blank.numel() : 0,
        .num_tokens = num_tokens,
        .top_k = top_k,
        .num_experts = in.candidates.size(0),
        .max_candidates = in.candidates.size(1),
        .slots_per_rank = in.slots_per_rank,
        .num_ranks = num_ranks,
        .ranks_per_node = sizes.ranks_per_node,
        .ranks_per_place = sizes.ranks_per_place(),
        .num_destinations = num_destinations,
    });
  });
  return out;
}

/// What a permutation of a dispatch makes of its rows.
struct Layout {
  std::int64_t num_experts, num_rows, capacity;
  at::Tensor sent_travel = {};  // [num_rows, 2 K], where notes go along
  at::Tensor overflow = {};
};

struct Permuted {
  at::Tensor rows, row_map, end_offsets;
};

template <typename Device>
Permuted permute(const Travelling& here, const at::Tensor& ids, const Layout& layout) {
  const at::Tensor& x = here.rows;
  const bool noted = layout.sent_travel.defined();
  const Permuted out{at::empty({layout.num_rows, x.size(1)}, x.options()),
                     at::empty(ids.sizes(), ids.options()),
                     at::empty({layout.num_experts}, ids.options())};
  Device::permute({.x = x.const_data_ptr(),
                   .scales = noted ? int_data(here.travel) : nullptr,
                   .topk_ids = ids.const_data_ptr<std::int32_t>(),
                   .expert_map = nullptr,
                   .rows = out.rows.mutable_data_ptr(),
                   .row_scales = int_data(layout.sent_travel),
                   .row_map = int_data(out.row_map),
                   .end_offsets = int_data(out.end_offsets),
                   .workspace = nullptr,
                   .num_tokens = ids.size(0),
                   .top_k = ids.size(1),
                   .num_ids = layout.num_experts,
                   .num_experts = layout.num_experts,
                   .num_rows = layout.num_rows,
                   .row_bytes = x.size(1) * x.element_size(),
                   .scale_bytes = noted ? here.travel.size(1) * here.travel.element_size() : 0,
                   .alignment = 1,
                   .counters = {},
                   .capacity = layout.capacity,
                   .overflow = int_data(layout.overflow),
                   .clears = false},
                  x);
  return out;
}

/// One hop, before it is known how many rows leave: they lie on the wire by place.
struct Packed {
  Travelling sent;
  at::Tensor send_map, end_offsets;
};

/// Rows to the wire: `capacity` to each place, whose notes begin as `blank`, or `num_rows` in all.
template <typename Device>
Packed pack(const Travelling& here,
            const at::Tensor& destinations,
            std::int64_t num_places,
            std::int64_t num_rows,
            std::int64_t capacity,
            const at::Tensor& blank,
            const at::Tensor& overflow) {
  const Range range("pack");
  const std::int64_t room = capacity > 0 ? num_places * capacity : num_rows;
  const at::Tensor travel =
      capacity > 0 ? blank : at::empty({room, here.travel.size(1)}, here.travel.options());
  const Permuted packed = permute<Device>(here,
                                          destinations,
                                          {.num_experts = num_places,
                                           .num_rows = room,
                                           .capacity = capacity,
                                           .sent_travel = travel,
                                           .overflow = capacity > 0 ? overflow : at::Tensor()});
  return {{packed.rows, travel}, packed.row_map, packed.end_offsets};
}

Travelling send(const Communicator& wire, const Travelling& sent, const at::Tensor& splits) {
  const Range range("send");
  const Splits shares(kDispatchOp, splits, wire.num_ranks());
  const std::int64_t num_rows = shares.num_sent(sent.rows.size(0));
  const auto exchange = [&](const at::Tensor& rows) {
    return wire.exchange(rows.narrow(0, 0, num_rows), shares.sent, shares.received);
  };
  return {exchange(sent.rows), exchange(sent.travel)};
}

/// Packs, on a gateway, the rows that came to its node for the ranks that they visit there.
template <typename Device>
Packed spread(const Inputs& in,
              const Path& path,
              const Sizes& sizes,
              const Travelling& here,
              std::int64_t num_rows,
              const Routed& routed) {
  const std::int64_t num_ranks = sizes.ranks_per_node;
  const std::int64_t top_k = in.topk_ids.size(1);
  const std::int64_t node = path.between_nodes().rank();
  const std::int64_t capacity = sizes.inside().capacity;
  const std::int64_t num_destinations = std::min(top_k, num_ranks);
  const at::Tensor destinations =
      at::empty({here.rows.size(0), num_destinations}, here.travel.options());
  const at::Tensor blank =
      at::empty({num_ranks * capacity, capacity > 0 ? 2 * top_k : 0}, here.travel.options());
  std::int64_t* const counters = in.counts ? routed.counted.mutable_data_ptr<std::int64_t>() +
                                                 routed.counted.numel() - num_ranks
                                           : nullptr;
  {
    const Range range("spread");
    Device::spread({.travel = here.travel.const_data_ptr<std::int32_t>(),
                    .destinations = int_data(destinations),
                    .counters = counters,
                    .blank = int_data(blank),
                    .blank_size = blank.numel(),
                    .num_rows = here.rows.size(0),
                    .top_k = top_k,
                    .first_slot = node * num_ranks * in.slots_per_rank,
                    .slots_per_rank = in.slots_per_rank,
                    .num_ranks = num_ranks,
                    .num_destinations = num_destinations});
  }
  return pack<Device>(here, destinations, num_ranks, num_rows, capacity, blank, routed.overflow);
}

/// Rows to the experts, `num_rows` of them.
template <typename Device>
void place(const Inputs& in,
           const Travelling& received,
           std::int64_t num_rows,
           std::int64_t rank,
           Dispatched& out) {
  const Range range("place");
  const std::int64_t arrived = received.rows.size(0);
  const std::int64_t top_k = in.topk_ids.size(1);
  const at::Tensor slots = at::empty({arrived, top_k}, received.travel.options());
  out.recv_weights = at::empty({arrived, top_k}, in.weights.options());
  Device::unpack({.travel = received.travel.const_data_ptr<std::int32_t>(),
                  .slots = int_data(slots),
                  .weights = out.recv_weights.template mutable_data_ptr<float>(),
                  .num_rows = arrived,
                  .top_k = top_k,
                  .first_slot = rank * in.slots_per_rank,
                  .slots_per_rank = in.slots_per_rank});
  const Permuted placed = permute<Device>(received,
                                          slots,
                                          {.num_experts = in.slots_per_rank,
                                           .num_rows = num_rows,
                                           .capacity = 0,
                                           .overflow = in.fixed() ? out.overflow : at::Tensor()});
  out.rows = placed.rows;
  out.recv_map = placed.row_map;
  out.end_offsets = placed.end_offsets;
}

void check_received(const Counts& counts, std::int64_t top_k) {
  for (const at::Tensor& splits : counts.splits) {
    TORCH_CHECK_VALUE(splits[1].sum().item<std::int64_t>() <= kMaxRows / top_k,
                      kDispatchOp,
                      ": more rows arrive than fit into the int32 maps");
  }
}

/// Of the first `num_hops` hops, which communicators carry.
Counts count(const Inputs& in,
             const Path& path,
             std::size_t num_hops,
             const at::Tensor& counts,
             const at::Tensor& place_ends,
             std::int64_t max_rows) {
  Counts out{.splits = {}, .num_choices = max_rows};
  if (in.fixed()) {
    // One for each hop: what an op returns may not share memory.
    for (std::size_t i = 0; i < num_hops; ++i) out.splits.push_back(at::empty({0}, at::kLong));
    return out;
  }
  out = num_hops < path.num_hops() ? count_crossing(path, counts, place_ends)
                                   : count_rows(path, counts, place_ends);
  check_received(out, in.topk_ids.size(1));
  return out;
}

template <typename Device>
Dispatched dispatch(const Inputs& in) {
  const Path path(kDispatchOp, in.groups);
  const Sizes sizes = check_dispatch(in, path);
  Device::check_limits(in, sizes.num_ranks);
  bool passes_on = false;
  if constexpr (Device::kHasPeers) passes_on = Device::passes_on_over_peers(in, sizes);
  const Routed routed = route<Device>(in, sizes);
  const std::int64_t most_rows = in.x.size(0) * routed.destinations.size(1);
  Packed packed = pack<Device>({in.x, routed.travel},
                               routed.destinations,
                               sizes.num_places(),
                               most_rows,
                               sizes.capacity,
                               routed.blank,
                               routed.overflow);
  const Counts counts = count(in,
                              path,
                              path.num_hops() - (passes_on ? 1 : 0),
                              routed.counts,
                              packed.end_offsets,
                              sizes.max_rows);

  Dispatched out;
  out.overflow = routed.overflow;
  out.counted = routed.counted;
  out.splits = counts.splits;
  if (path.crosses_nodes()) {
    out.send_maps.push_back(packed.send_map);
    const Travelling here = send(path.between_nodes(), packed.sent, counts.splits[0]);
    if constexpr (Device::kHasPeers) {
      if (passes_on) {
        Device::pass_on_over_peers(in, path, sizes, here.rows, here.travel, out);
        return out;
      }
    }
    const std::int64_t num_rows = in.fixed() ? 0 : counts.splits[1][0].sum().item<std::int64_t>();
    packed = spread<Device>(in, path, sizes, here, num_rows, routed);
  }
  out.send_maps.push_back(packed.send_map);
  const Travelling received = send(path.last(), packed.sent, counts.splits.back());
  place<Device>(in, received, counts.num_choices, path.rank(), out);
  return out;
}

}  // namespace

#ifdef MOETUNER_WITH_CUDA
Dispatched dispatch_cuda(const Inputs& in) {
  const c10::DeviceGuard guard(in.x.device());
  const Path path(kDispatchOp, in.groups);
  const Sizes sizes = check_dispatch(in, path);
  Cuda::check_limits(in, sizes.num_ranks);
  Dispatched out;
  return dispatch_over_peers(in, sizes, out) ? out : dispatch<Cuda>(in);
}
#endif

Dispatched dispatch_cpu(const Inputs& in) { return dispatch<Cpu>(in); }

}  // namespace moetuner
