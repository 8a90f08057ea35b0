#include "peer_exchange.h"

#ifdef MOETUNER_WITH_CUDA

#include "moetuner/ops/dispatch.h"
#include "moetuner/transport/exchange.h"
#include "peer_group.h"
#include "ranges.h"

#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <limits>

namespace moetuner {
namespace {

using transport::WindowShape;

std::int64_t bytes_of_row(const at::Tensor& rows) { return rows.size(1) * rows.element_size(); }

std::int64_t rounded_bytes(std::int64_t bytes) {
  return std::max<std::int64_t>((bytes + 15) / 16 * 16, 16);
}

std::optional<Dtype> dtype_of(const at::Tensor& rows) {
  switch (rows.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      return std::nullopt;
  }
}

/// Rows to and from each rank: as they are, or equal shares of the lines.
transport::Shares shares_of(const char* op,
                            const Splits& rows,
                            std::int64_t num_lines,
                            std::int64_t num_ranks) {
  rows.check_received(op, num_lines, num_ranks);
  transport::Shares out{};
  for (std::int64_t g = 0; g < num_ranks; ++g) {
    const auto i = static_cast<std::size_t>(g);
    const bool equal = rows.sent.empty();
    out.sent[g] = static_cast<std::int32_t>(equal ? num_lines / num_ranks : rows.sent[i]);
    out.received[g] = static_cast<std::int32_t>(equal ? num_lines / num_ranks : rows.received[i]);
  }
  return out;
}

/// The exact form's one look at sizes: grows the window until all rows fit, and returns whether it
/// did, so that the first kernel has to run again.
bool wait_for_sizes(PeerGroup& group, std::uint32_t ticket, WindowShape shape) {
  const Range range("counts");
  if (!group.window().wait_for_sizes(ticket)) group.fail(kDispatchOp);
  const transport::HostBox& host = group.window().host();
  if (host.largest <= group.window().shape().num_rows) return false;
  shape.num_rows = host.largest;
  group.grow(kDispatchOp, shape);
  return true;
}

/// Room that a dispatch is known to need; all ranks know the same but for rows.
WindowShape shape_of(const DispatchInputs& in, const Sizes& sizes, const PeerGroup& group) {
  // Experts answer in 16 bits or more to rows of 8.
  const std::int64_t widest =
      std::max<std::int64_t>(in.x.element_size(), 2) * std::max<std::int64_t>(in.x.size(1), 1);
  const std::int64_t top_k = in.topk_ids.size(1);
  return {.num_ranks = sizes.num_ranks,
          .num_rows = in.fixed()        ? sizes.capacity
                      : group.is_open() ? 1
                                        : in.x.size(0),
          .row_bytes = rounded_bytes(std::max(widest, top_k * 4)),
          .top_k = top_k,
          .slots_per_rank = in.slots_per_rank};
}

/// What a dispatch adds to; null: nothing is counted.
struct Counting {
  std::int64_t* counters;   // of one hop
  std::int64_t* passed_on;  // of the last of two
};

/// Adds maps and rows to `out`, which has the overflow. Without candidates, ids are slots.
template <typename Id>
void run(const DispatchInputs& in,
         const Sizes& sizes,
         const Counting& counting,
         PeerGroup& group,
         Dispatched& out) {
  group.check(kDispatchOp);
  group.follow_stream();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto int32 = in.x.options().dtype(at::kInt);
  const std::int64_t num_tokens = in.topk_ids.size(0);
  const std::int64_t top_k = in.topk_ids.size(1);
  const std::int64_t num_ranks = sizes.num_ranks;
  const bool named = in.candidates.defined();
  const at::Tensor workspace = at::empty(
      {transport::cuda::dispatch_workspace(num_tokens, top_k, num_ranks, in.slots_per_rank)},
      int32);
  const at::Tensor send_map = at::empty({num_tokens, std::min(top_k, num_ranks)}, int32);
  out.end_offsets = at::empty({in.slots_per_rank}, int32);
  transport::DispatchArgs<Id> args{
      .x = in.x.const_data_ptr(),
      .topk_ids = in.topk_ids.const_data_ptr<Id>(),
      .weights = in.weights.const_data_ptr<float>(),
      .candidates = named ? in.candidates.const_data_ptr<std::int32_t>() : nullptr,
      .num_candidates = named ? in.num_candidates.const_data_ptr<std::int32_t>() : nullptr,
      .send_map = send_map.mutable_data_ptr<std::int32_t>(),
      .end_offsets = out.end_offsets.template mutable_data_ptr<std::int32_t>(),
      .overflow = in.fixed() ? out.overflow.template mutable_data_ptr<std::int32_t>() : nullptr,
      .counters = counting.counters,
      .passed_on = counting.passed_on,
      .workspace = workspace.mutable_data_ptr<std::int32_t>(),
      .rows = nullptr,
      .recv_map = nullptr,
      .recv_weights = nullptr,
      .ticket = 0,
      .num_tokens = num_tokens,
      .top_k = top_k,
      .num_experts = named ? in.candidates.size(0) : num_ranks * in.slots_per_rank,
      .max_candidates = named ? in.candidates.size(1) : 1,
      .slots_per_rank = in.slots_per_rank,
      .ranks_per_node = sizes.ranks_per_node,
      .row_bytes = bytes_of_row(in.x),
      .capacity = sizes.capacity,
      .max_rows = in.fixed() ? sizes.max_rows : std::int64_t{std::numeric_limits<int>::max()},
      .senders = static_cast<int>(group.settings().senders)};
  std::int64_t num_lines = num_ranks * sizes.capacity;
  at::Tensor splits = at::empty({0}, at::kLong);
  do {
    if (!in.fixed()) args.ticket = group.window().next_ticket();
    const Range range("route");
    transport::cuda::route_and_send(args, group.window().peers(), stream);
    args.counters = args.passed_on = nullptr;  // which a second time would count twice
  } while (!in.fixed() && wait_for_sizes(group, args.ticket, group.window().shape()));
  if (!in.fixed()) {
    const transport::HostBox& host = group.window().host();
    splits = at::empty({2, num_ranks}, at::kLong);
    auto* shares = splits.mutable_data_ptr<std::int64_t>();
    std::copy_n(host.sent, num_ranks, shares);
    std::copy_n(host.received, num_ranks, shares + num_ranks);
    num_lines = 0;
    for (std::int64_t g = 0; g < num_ranks; ++g) num_lines += host.received[g];
    TORCH_CHECK_VALUE(num_lines <= kMaxRows / top_k && host.num_choices <= kMaxRows,
                      kDispatchOp,
                      ": more rows arrive than fit into the int32 maps");
    args.max_rows = host.num_choices;
  }
  const Range range("spread");
  out.rows = at::empty({args.max_rows, in.x.size(1)}, in.x.options());
  out.recv_map = at::empty({num_lines, top_k}, int32);
  out.recv_weights = at::empty({num_lines, top_k}, in.weights.options());
  out.send_maps.push_back(send_map);
  out.splits.push_back(splits);
  args.rows = out.rows.mutable_data_ptr();
  args.recv_map = out.recv_map.template mutable_data_ptr<std::int32_t>();
  args.recv_weights = out.recv_weights.template mutable_data_ptr<float>();
  transport::cuda::spread(args, group.window().peers(), stream);
}

/// The group of a hop, ready for an operation on rows like these.
PeerGroup& ready_group(const char* op, const Hop& hop, const at::Tensor& rows) {
  PeerGroup& group = peer_group(hop.group);
  WindowShape shape = group.window().shape();
  shape.row_bytes = std::max(shape.row_bytes, rounded_bytes(bytes_of_row(rows)));
  group.opens(op, shape);
  group.follow_stream();
  return group;
}

}  // namespace

bool goes_over_peers(const char* op, const at::Tensor& rows, const std::string& group_name) {
  if (!rows.is_cuda() || !dtype_of(rows).has_value()) return false;
  PeerGroup& group = peer_group(group_name);
  if (!group.is_open()) return false;
  group.check(op);
  return true;
}

bool dispatch_over_peers(const DispatchInputs& in, const Sizes& sizes, Dispatched& out) {
  if (sizes.crosses_nodes) return false;
  PeerGroup& group = peer_group(in.groups[0]);
  if (!group.opens(kDispatchOp, shape_of(in, sizes, group))) return false;
  const std::int64_t num_ranks = sizes.num_ranks;
  out.overflow = at::zeros({in.fixed() ? 1 : 0}, in.x.options().dtype(at::kInt));
  const std::int64_t num_counted =
      1 + num_ranks + sizes.num_nodes() + num_ranks * in.slots_per_rank;
  out.counted = at::zeros({in.counts ? num_counted : 0}, in.x.options().dtype(at::kLong));
  const Counting counting{
      .counters = in.counts ? out.counted.mutable_data_ptr<std::int64_t>() : nullptr,
      .passed_on = nullptr};
  with_id_type(in.topk_ids, [&]<typename Id>() { run<Id>(in, sizes, counting, group, out); });
  return true;
}

bool passes_on_over_peers(const DispatchInputs& in, const Sizes& sizes) {
  if (!sizes.crosses_nodes) return false;
  PeerGroup& group = peer_group_of_node(kDispatchOp, in.groups[1], in.groups[0]);
  if (!group.opens(kDispatchOp, shape_of(in, sizes.inside(), group))) return false;
  group.check(kDispatchOp);
  return true;
}

void pass_on_over_peers(const DispatchInputs& in,
                        const Path& path,
                        const Sizes& sizes,
                        const at::Tensor& rows,
                        const at::Tensor& travel,
                        Dispatched& out) {
  const std::int64_t top_k = in.topk_ids.size(1);
  const std::int64_t slots_of_node = sizes.ranks_per_node * in.slots_per_rank;
  const at::Tensor slots = at::empty({rows.size(0), top_k}, travel.options());
  const at::Tensor weights = at::empty({rows.size(0), top_k}, in.weights.options());
  cuda::unpack({.travel = travel.const_data_ptr<std::int32_t>(),
                .slots = slots.mutable_data_ptr<std::int32_t>(),
                .weights = weights.mutable_data_ptr<float>(),
                .num_rows = rows.size(0),
                .top_k = top_k,
                .first_slot = path.between_nodes().rank() * slots_of_node,
                .slots_per_rank = slots_of_node},
               c10::cuda::getCurrentCUDAStream());
  const at::Tensor none;
  const DispatchInputs arrived{.x = rows,
                               .topk_ids = slots,
                               .weights = weights,
                               .candidates = none,
                               .num_candidates = none,
                               .slots_per_rank = in.slots_per_rank,
                               .groups = in.groups,
                               .capacity = in.capacity,
                               .max_rows = in.max_rows,
                               .ranks_per_node = sizes.ranks_per_node,
                               .counts = in.counts};
  const Counting counting{.counters = nullptr,
                          .passed_on = in.counts ? out.counted.mutable_data_ptr<std::int64_t>() +
                                                       out.counted.numel() - sizes.num_passed_on()
                                                 : nullptr};
  run<std::int32_t>(arrived, sizes.inside(), counting, peer_group(in.groups[1]), out);
}

at::Tensor sum_over_peers(const char* op,
                          const at::Tensor& rows,
                          const at::Tensor& recv_map,
                          const OptionalTensor& recv_weights,
                          bool by_lines,
                          const Hop& hop) {
  const c10::DeviceGuard guard(rows.device());
  const Range range("sum");
  PeerGroup& group = ready_group(op, hop, rows);
  const at::Tensor& send_map = hop.send_map;
  const at::Tensor out = at::empty({send_map.size(0), rows.size(1)}, rows.options());
  const transport::SumArgs args{
      .rows = rows.const_data_ptr(),
      .recv_map = by_lines ? nullptr : recv_map.const_data_ptr<std::int32_t>(),
      .recv_weights = recv_weights ? recv_weights->const_data_ptr<float>() : nullptr,
      .send_map = send_map.const_data_ptr<std::int32_t>(),
      .lines = hop.shares.sent.empty() ? recv_map.const_data_ptr<std::int32_t>() : nullptr,
      .out = out.mutable_data_ptr(),
      .shares = shares_of(op, hop.shares, recv_map.size(0), group.num_ranks()),
      .dtype = *dtype_of(rows),
      .num_tokens = send_map.size(0),
      .top_k = by_lines ? 1 : recv_map.size(1),
      .num_destinations = send_map.size(1),
      .num_rows = rows.size(0),
      .hidden = rows.size(1),
      .lines_top_k = recv_map.size(1),
      .senders = static_cast<int>(group.settings().senders)};
  transport::cuda::sum(args, group.window().peers(), c10::cuda::getCurrentCUDAStream());
  return out;
}

at::Tensor resend_over_peers(const char* op,
                             const at::Tensor& rows,
                             const at::Tensor& recv_map,
                             const Hop& hop) {
  const c10::DeviceGuard guard(rows.device());
  const Range range("resend");
  PeerGroup& group = ready_group(op, hop, rows);
  const at::Tensor& send_map = hop.send_map;
  const at::Tensor received = at::empty({recv_map.size(0), rows.size(1)}, rows.options());
  const transport::ResendArgs args{
      .x = rows.const_data_ptr(),
      .send_map = send_map.const_data_ptr<std::int32_t>(),
      .lines = hop.shares.sent.empty() ? recv_map.const_data_ptr<std::int32_t>() : nullptr,
      .received = received.mutable_data_ptr(),
      .shares = shares_of(op, hop.shares, recv_map.size(0), group.num_ranks()),
      .num_tokens = send_map.size(0),
      .num_destinations = send_map.size(1),
      .row_bytes = bytes_of_row(rows),
      .top_k = recv_map.size(1),
      .senders = static_cast<int>(group.settings().senders)};
  transport::cuda::resend(args, group.window().peers(), c10::cuda::getCurrentCUDAStream());
  return received;
}

}  // namespace moetuner

#endif
