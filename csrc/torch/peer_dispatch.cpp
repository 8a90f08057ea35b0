#include "moetuner/ops/dispatch.h"
#include "moetuner/transport/exchange.h"
#include "peer_exchange.h"

#ifdef MOETUNER_WITH_CUDA

#include "peer_group.h"
#include "ranges.h"

#include <c10/cuda/CUDAStream.h>

#include <algorithm>

// The way out: the first of two kernels routes and sends, the second spreads what arrives.

namespace moetuner {
namespace {

using transport::WindowShape;

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

/// Where a dispatch counts; null: nothing is counted.
struct Counting {
  std::int64_t* counters;   // of one hop
  std::int64_t* passed_on;  // of the last of two
};

/// One dispatch inside a group: its two kernels, and what they share.
template <typename Id>
class Exchange {
 public:
  /// `out` has the overflow. Without candidates, ids are slots.
  Exchange(const DispatchInputs& in,
           const Sizes& sizes,
           const Counting& counting,
           PeerGroup& group,
           Dispatched& out)
      : in_(in),
        sizes_(sizes),
        group_(group),
        out_(out),
        int32_(in.x.options().dtype(at::kInt)),
        num_tokens_(in.topk_ids.size(0)),
        top_k_(in.topk_ids.size(1)) {
    group.check(kDispatchOp);
    group.follow_stream();
    workspace_ = at::empty({transport::cuda::dispatch_workspace(
                               num_tokens_, top_k_, sizes.num_ranks, in.slots_per_rank)},
                           int32_);
    send_map_ = at::empty({num_tokens_, std::min(top_k_, sizes.num_ranks)}, int32_);
    out.end_offsets = at::empty({in.slots_per_rank}, int32_);
    fill(counting);
  }

  void run() {
    in_.fixed() ? run_fixed() : run_exact();
    out_.send_maps.push_back(send_map_);
  }

 private:
  using Args = transport::DispatchArgs<Id>;

  void fill(const Counting& counting) {
    const bool named = in_.candidates.defined();
    args_ = {
        .x = in_.x.const_data_ptr(),
        .topk_ids = in_.topk_ids.const_data_ptr<Id>(),
        .weights = in_.weights.const_data_ptr<float>(),
        .candidates = named ? in_.candidates.const_data_ptr<std::int32_t>() : nullptr,
        .num_candidates = named ? in_.num_candidates.const_data_ptr<std::int32_t>() : nullptr,
        .send_map = send_map_.mutable_data_ptr<std::int32_t>(),
        .end_offsets = out_.end_offsets.template mutable_data_ptr<std::int32_t>(),
        .overflow = in_.fixed() ? out_.overflow.template mutable_data_ptr<std::int32_t>() : nullptr,
        .counters = counting.counters,
        .passed_on = counting.passed_on,
        .workspace = workspace_.mutable_data_ptr<std::int32_t>(),
        .rows = nullptr,
        .recv_map = nullptr,
        .recv_weights = nullptr,
        .ticket = 0,
        .num_tokens = num_tokens_,
        .top_k = top_k_,
        .num_experts = named ? in_.candidates.size(0) : sizes_.num_ranks * in_.slots_per_rank,
        .max_candidates = named ? in_.candidates.size(1) : 1,
        .slots_per_rank = in_.slots_per_rank,
        .ranks_per_node = sizes_.ranks_per_node,
        .row_bytes = bytes_of_row(in_.x),
        .capacity = sizes_.capacity,
        .max_rows = in_.fixed() ? sizes_.max_rows : kMaxRows,
        .max_lines = sizes_.num_ranks * sizes_.capacity,
        .adds_overflow = !named,  // to that of the hop between nodes
        .senders = static_cast<int>(group_.settings().senders)};
  }

  void run_fixed() {
    route();
    make_room({.lines = args_.max_lines, .rows = args_.max_rows});
    spread();
    out_.splits.push_back(at::empty({0}, at::kLong));
  }

  /// The host looks once at the sizes: behind the second kernel where it can guess them.
  void run_exact() {
    const void* const layer = args_.candidates;
    const auto guess =
        layer == nullptr ? std::nullopt : group_.size_guess().next(layer, num_tokens_);
    do {
      args_.ticket = group_.window().next_ticket();
      route();
      if (guess) {
        make_room(*guess);
        spread();
      }
    } while (wait_for_sizes(group_, args_.ticket, group_.window().shape()));
    const Arrived arrived = read_sizes();
    if (!guess || guess->lines < arrived.lines || guess->rows < arrived.rows) {
      make_room(arrived);
      spread();
    } else {
      cut_to(arrived);
    }
    if (layer != nullptr) group_.size_guess().saw(layer, num_tokens_, arrived);
  }

  void route() {
    const Range range("route");
    transport::cuda::route_and_send(
        args_, group_.window().peers(), c10::cuda::getCurrentCUDAStream());
  }

  void spread() {
    const Range range("spread");
    transport::cuda::spread(args_, group_.window().peers(), c10::cuda::getCurrentCUDAStream());
  }

  void make_room(const Arrived& most) {
    out_.rows = out_.recv_map = out_.recv_weights = at::Tensor();  // a guess's memory first
    out_.rows = at::empty({most.rows, in_.x.size(1)}, in_.x.options());
    out_.recv_map = at::empty({most.lines, top_k_}, int32_);
    out_.recv_weights = at::empty({most.lines, top_k_}, in_.weights.options());
    args_.rows = out_.rows.mutable_data_ptr();
    args_.recv_map = out_.recv_map.template mutable_data_ptr<std::int32_t>();
    args_.recv_weights = out_.recv_weights.template mutable_data_ptr<float>();
    args_.max_rows = most.rows;
    args_.max_lines = most.lines;
  }

  /// Tensors that nobody else has seen need no views of them.
  void cut_to(const Arrived& arrived) {
    const auto cut = [](const at::Tensor& tensor, std::int64_t length) {
      tensor.unsafeGetTensorImpl()->set_sizes_contiguous({length, tensor.size(1)});
    };
    cut(out_.rows, arrived.rows);
    cut(out_.recv_map, arrived.lines);
    cut(out_.recv_weights, arrived.lines);
  }

  /// From what the device has told; the splits of the hop too.
  Arrived read_sizes() {
    const transport::HostBox& host = group_.window().host();
    const at::Tensor splits = at::empty({2, sizes_.num_ranks}, at::kLong);
    auto* shares = splits.mutable_data_ptr<std::int64_t>();
    std::copy_n(host.sent, sizes_.num_ranks, shares);
    std::copy_n(host.received, sizes_.num_ranks, shares + sizes_.num_ranks);
    out_.splits.push_back(splits);
    Arrived arrived{.lines = 0, .rows = host.num_choices};
    for (std::int64_t g = 0; g < sizes_.num_ranks; ++g) arrived.lines += host.received[g];
    TORCH_CHECK_VALUE(arrived.lines <= kMaxRows / top_k_ && arrived.rows <= kMaxRows,
                      kDispatchOp,
                      ": more rows arrive than fit into the int32 maps");
    return arrived;
  }

  const DispatchInputs& in_;
  const Sizes& sizes_;
  PeerGroup& group_;
  Dispatched& out_;
  at::TensorOptions int32_;
  std::int64_t num_tokens_, top_k_;
  at::Tensor workspace_, send_map_;
  Args args_;
};

}  // namespace

bool dispatch_over_peers(const DispatchInputs& in, const Sizes& sizes, Dispatched& out) {
  if (sizes.crosses_nodes) return false;
  PeerGroup& group = peer_group(in.groups[0]);
  if (!group.opens(kDispatchOp, shape_of(in, sizes, group))) return false;
  const std::int64_t num_ranks = sizes.num_ranks;
  out.overflow = at::empty({in.fixed() ? 1 : 0}, in.x.options().dtype(at::kInt));
  const std::int64_t num_counted =
      1 + num_ranks + sizes.num_nodes() + num_ranks * in.slots_per_rank;
  out.counted = at::empty({in.counts ? num_counted : 0}, in.x.options().dtype(at::kLong));
  const Counting counting{
      .counters = in.counts ? out.counted.mutable_data_ptr<std::int64_t>() : nullptr,
      .passed_on = nullptr};
  with_id_type(in.topk_ids,
               [&]<typename Id>() { Exchange<Id>(in, sizes, counting, group, out).run(); });
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
  const Sizes inside = sizes.inside();
  Exchange<std::int32_t>(arrived, inside, counting, peer_group(in.groups[1]), out).run();
}

}  // namespace moetuner

#endif
