#include "peer_exchange.h"

#include "moetuner/transport/exchange.h"
#include "peer_group.h"
#include "ranges.h"

#include <algorithm>
#include <limits>

#ifdef MOETUNER_WITH_CUDA
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace moetuner {

#ifndef MOETUNER_WITH_CUDA

bool goes_over_peers(const at::Tensor&, const std::vector<std::string>&) { return false; }

#else

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

/// Rows to and from each rank: `splits`, or equal shares of the lines.
transport::Shares shares_of(const char* op,
                            const at::Tensor& splits,
                            std::int64_t num_lines,
                            std::int64_t num_ranks) {
  const Splits rows(op, splits, num_ranks);
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

template <typename Id>
void run(const DispatchInputs& in, const Sizes& sizes, PeerGroup& group, Dispatched& out) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto int32 = in.x.options().dtype(at::kInt);
  const std::int64_t num_tokens = in.topk_ids.size(0);
  const std::int64_t top_k = in.topk_ids.size(1);
  const std::int64_t num_ranks = sizes.num_ranks;
  const at::Tensor workspace = at::empty(
      {transport::cuda::dispatch_workspace(num_tokens, top_k, num_ranks, in.slots_per_rank)},
      int32);
  const at::Tensor send_map = at::empty({num_tokens, std::min(top_k, num_ranks)}, int32);
  out.end_offsets = at::empty({in.slots_per_rank}, int32);
  transport::DispatchArgs<Id> args{
      .x = in.x.const_data_ptr(),
      .topk_ids = in.topk_ids.const_data_ptr<Id>(),
      .weights = in.weights.const_data_ptr<float>(),
      .candidates = in.candidates.const_data_ptr<std::int32_t>(),
      .num_candidates = in.num_candidates.const_data_ptr<std::int32_t>(),
      .send_map = send_map.mutable_data_ptr<std::int32_t>(),
      .end_offsets = out.end_offsets.template mutable_data_ptr<std::int32_t>(),
      .overflow = in.fixed() ? out.overflow.template mutable_data_ptr<std::int32_t>() : nullptr,
      .counters = in.counts ? out.counted.template mutable_data_ptr<std::int64_t>() : nullptr,
      .workspace = workspace.mutable_data_ptr<std::int32_t>(),
      .rows = nullptr,
      .recv_map = nullptr,
      .recv_weights = nullptr,
      .ticket = 0,
      .num_tokens = num_tokens,
      .top_k = top_k,
      .num_experts = in.candidates.size(0),
      .max_candidates = in.candidates.size(1),
      .slots_per_rank = in.slots_per_rank,
      .ranks_per_node = sizes.ranks_per_node,
      .row_bytes = bytes_of_row(in.x),
      .capacity = sizes.capacity,
      .max_rows = in.fixed() ? sizes.max_rows : std::int64_t{std::numeric_limits<int>::max()},
      .senders = static_cast<int>(group.settings().senders)};
  std::int64_t num_lines = num_ranks * sizes.capacity;
  out.splits = {at::empty({0}, at::kLong)};
  do {
    if (!in.fixed()) args.ticket = group.window().next_ticket();
    const Range range("route");
    transport::cuda::route_and_send(args, group.window().peers(), stream);
    args.counters = nullptr;  // which a second time would count twice
  } while (!in.fixed() && wait_for_sizes(group, args.ticket, group.window().shape()));
  if (!in.fixed()) {
    const transport::HostBox& host = group.window().host();
    out.splits[0] = at::empty({2, num_ranks}, at::kLong);
    auto* splits = out.splits[0].template mutable_data_ptr<std::int64_t>();
    std::copy_n(host.sent, num_ranks, splits);
    std::copy_n(host.received, num_ranks, splits + num_ranks);
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
  out.send_maps = {send_map};
  args.rows = out.rows.mutable_data_ptr();
  args.recv_map = out.recv_map.template mutable_data_ptr<std::int32_t>();
  args.recv_weights = out.recv_weights.template mutable_data_ptr<float>();
  transport::cuda::spread(args, group.window().peers(), stream);
}

}  // namespace

bool goes_over_peers(const at::Tensor& rows, const std::vector<std::string>& groups) {
  return rows.is_cuda() && groups.size() == 1 && peer_group(groups[0]).is_open() &&
         dtype_of(rows).has_value();
}

bool dispatch_over_peers(const DispatchInputs& in, const Sizes& sizes, Dispatched& out) {
  if (sizes.crosses_nodes) return false;
  PeerGroup& group = peer_group(in.groups[0]);
  // Experts answer in 16 bits or more to rows of 8; what is known of them all ranks know alike.
  const std::int64_t widest =
      std::max<std::int64_t>(in.x.element_size(), 2) * std::max<std::int64_t>(in.x.size(1), 1);
  const WindowShape shape{.num_ranks = sizes.num_ranks,
                          .num_rows = in.fixed()        ? sizes.capacity
                                      : group.is_open() ? 1
                                                        : in.x.size(0),
                          .row_bytes = rounded_bytes(std::max(widest, in.topk_ids.size(1) * 4)),
                          .top_k = in.topk_ids.size(1),
                          .slots_per_rank = in.slots_per_rank};
  if (!group.opens(kDispatchOp, shape)) return false;
  group.check(kDispatchOp);
  group.follow_stream();
  const std::int64_t num_ranks = sizes.num_ranks;
  out.overflow = at::zeros({in.fixed() ? 1 : 0}, in.x.options().dtype(at::kInt));
  const std::int64_t num_counted =
      1 + num_ranks + sizes.num_nodes() + num_ranks * in.slots_per_rank;
  out.counted = at::zeros({in.counts ? num_counted : 0}, in.x.options().dtype(at::kLong));
  with_id_type(in.topk_ids, [&]<typename Id>() { run<Id>(in, sizes, group, out); });
  return true;
}

at::Tensor sum_over_peers(const char* op,
                          const at::Tensor& rows,
                          const at::Tensor& recv_map,
                          const OptionalTensor& recv_weights,
                          bool by_lines,
                          const at::Tensor& send_map,
                          const at::Tensor& splits,
                          const std::string& group_name) {
  const c10::DeviceGuard guard(rows.device());
  const Range range("sum");
  PeerGroup& group = peer_group(group_name);
  WindowShape shape = group.window().shape();
  shape.row_bytes = std::max(shape.row_bytes, rounded_bytes(bytes_of_row(rows)));
  group.opens(op, shape);
  group.check(op);
  group.follow_stream();
  const at::Tensor out = at::empty({send_map.size(0), rows.size(1)}, rows.options());
  const transport::SumArgs args{
      .rows = rows.const_data_ptr(),
      .recv_map = by_lines ? nullptr : recv_map.const_data_ptr<std::int32_t>(),
      .recv_weights = recv_weights ? recv_weights->const_data_ptr<float>() : nullptr,
      .send_map = send_map.const_data_ptr<std::int32_t>(),
      .lines = splits.numel() == 0 ? recv_map.const_data_ptr<std::int32_t>() : nullptr,
      .out = out.mutable_data_ptr(),
      .shares = shares_of(op, splits, recv_map.size(0), group.num_ranks()),
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
                             const at::Tensor& send_map,
                             const at::Tensor& splits,
                             const std::string& group_name) {
  const c10::DeviceGuard guard(rows.device());
  const Range range("resend");
  PeerGroup& group = peer_group(group_name);
  WindowShape shape = group.window().shape();
  shape.row_bytes = std::max(shape.row_bytes, rounded_bytes(bytes_of_row(rows)));
  group.opens(op, shape);
  group.check(op);
  group.follow_stream();
  const at::Tensor received = at::empty({recv_map.size(0), rows.size(1)}, rows.options());
  const transport::ResendArgs args{
      .x = rows.const_data_ptr(),
      .send_map = send_map.const_data_ptr<std::int32_t>(),
      .lines = splits.numel() == 0 ? recv_map.const_data_ptr<std::int32_t>() : nullptr,
      .received = received.mutable_data_ptr(),
      .shares = shares_of(op, splits, recv_map.size(0), group.num_ranks()),
      .num_tokens = send_map.size(0),
      .num_destinations = send_map.size(1),
      .row_bytes = bytes_of_row(rows),
      .top_k = recv_map.size(1),
      .senders = static_cast<int>(group.settings().senders)};
  transport::cuda::resend(args, group.window().peers(), c10::cuda::getCurrentCUDAStream());
  return received;
}

#endif

}  // namespace moetuner
