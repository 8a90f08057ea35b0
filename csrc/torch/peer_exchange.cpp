#include "peer_exchange.h"

#ifdef MOETUNER_WITH_CUDA

#include "moetuner/transport/exchange.h"
#include "peer_group.h"
#include "ranges.h"

#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

namespace moetuner {
namespace {

using transport::WindowShape;

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
