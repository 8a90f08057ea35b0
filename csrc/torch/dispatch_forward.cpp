#include "dispatch_forward.h"

#include "moetuner/ops/dispatch.h"
#include "moetuner/ops/permute.h"
#include "ranges.h"
#include "wire.h"

#include <algorithm>

#ifdef MOETUNER_WITH_CUDA
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

// The plain form sends what there is, which takes one look at the counts on the host; the fixed one
// sends shares of equal size and looks at nothing.
//
//     route     slots and ranks of each token
//
//     pack      rows to the wire by rank, one for each (token, rank): `permute`, ranks as experts
//
//     send      rows, and the slots and weights of their tokens
//
//     place     slots that are here, and rows to them: `permute` again

namespace moetuner {
namespace {

constexpr const char* kOp = kDispatchOp;

using Inputs = DispatchInputs;

/// Sizes of the call, once they are checked; `capacity` and `max_rows` are 0 in the exact form.
struct Sizes {
  std::int64_t num_ranks, ranks_per_node, capacity, max_rows;

  std::int64_t num_nodes() const { return num_ranks / ranks_per_node; }
};

/// Where the twins run.
struct Cpu {
  static void check_limits(const Inputs&, std::int64_t) {}
  template <typename Id>
  static void route(const RouteArgs<Id>& args) {
    cpu::route(args);
  }
  static void unpack(const UnpackArgs& args) { cpu::unpack(args); }
  static void permute(PermuteArgs<std::int32_t> args, const at::Tensor&) { cpu::permute(args); }
};

#ifdef MOETUNER_WITH_CUDA
struct Cuda {
  static void check_limits(const Inputs& in, std::int64_t num_ranks) {
    TORCH_CHECK_VALUE(in.slots_per_rank <= cuda::kMaxPermuteExperts,
                      kOp,
                      ": slots_per_rank must be at most ",
                      cuda::kMaxPermuteExperts,
                      " on CUDA, got ",
                      in.slots_per_rank);
    TORCH_CHECK_VALUE(num_ranks * (in.slots_per_rank + 3) <= cuda::kMaxRouteSlots,
                      kOp,
                      ": at most ",
                      cuda::kMaxRouteSlots,
                      " slots, ranks and nodes together on CUDA, got ",
                      num_ranks,
                      " ranks of ",
                      in.slots_per_rank,
                      " slots");
    TORCH_CHECK_VALUE(in.topk_ids.size(1) <= cuda::kMaxPermuteTopK,
                      kOp,
                      ": topk_ids may have at most ",
                      cuda::kMaxPermuteTopK,
                      " experts per token on CUDA, got ",
                      in.topk_ids.size(1));
  }
  template <typename Id>
  static void route(const RouteArgs<Id>& args) {
    cuda::route(args, c10::cuda::getCurrentCUDAStream());
  }
  static void unpack(const UnpackArgs& args) {
    cuda::unpack(args, c10::cuda::getCurrentCUDAStream());
  }
  static void permute(PermuteArgs<std::int32_t> args, const at::Tensor& like) {
    at::Tensor workspace;
    const std::int64_t size =
        cuda::permute_workspace(args.num_tokens, args.top_k, args.num_experts);
    if (size > 0) {
      workspace = at::empty({size}, like.options().dtype(at::kInt));
      args.workspace = workspace.mutable_data_ptr<std::int32_t>();
    }
    cuda::permute(args, c10::cuda::getCurrentCUDAStream());
  }
};
#endif

void check_table(const char* name, const at::Tensor& table, std::int64_t dim, const at::Tensor& x) {
  TORCH_CHECK_VALUE(table.dim() == dim,
                    kOp,
                    ": ",
                    name,
                    dim == 2 ? " must be [experts, replicas]" : " must be [experts]",
                    ", got ",
                    table.sizes());
  TORCH_CHECK_TYPE(table.scalar_type() == at::kInt,
                   kOp,
                   ": ",
                   name,
                   " must be int32, got ",
                   table.scalar_type());
  check_contiguous(kOp, name, table);
  check_device(kOp, name, table, "x", x);
}

void check(const Inputs& in) {
  const at::Tensor& x = in.x;
  const at::Tensor& ids = in.topk_ids;
  const at::Tensor& weights = in.weights;
  const at::Tensor& candidates = in.candidates;
  const at::Tensor& num_candidates = in.num_candidates;
  check_tokens(kOp, x, ids);
  TORCH_CHECK_VALUE(weights.sizes() == ids.sizes(),
                    kOp,
                    ": topk_weights must be ",
                    ids.sizes(),
                    " like topk_ids, got ",
                    weights.sizes());
  TORCH_CHECK_TYPE(weights.scalar_type() == at::kFloat,
                   kOp,
                   ": topk_weights must be float32, got ",
                   weights.scalar_type());
  check_contiguous(kOp, "topk_weights", weights);
  check_device(kOp, "topk_weights", weights, "x", x);
  check_table("candidates", candidates, 2, x);
  check_table("num_candidates", num_candidates, 1, x);
  TORCH_CHECK_VALUE(candidates.size(0) == num_candidates.size(0) && candidates.size(1) > 0,
                    kOp,
                    ": candidates must be [",
                    num_candidates.size(0),
                    ", replicas] as num_candidates says, got ",
                    candidates.sizes());
}

/// 0 where none is given.
std::int64_t given_size(const char* name, const std::optional<c10::SymInt>& size) {
  if (!size) return 0;
  const std::int64_t value = size->expect_int();
  TORCH_CHECK_VALUE(value > 0, kOp, ": ", name, " must be positive, got ", value);
  return value;
}

Sizes check_sizes(const Inputs& in, std::int64_t num_ranks) {
  TORCH_CHECK_VALUE(
      in.slots_per_rank > 0, kOp, ": slots_per_rank must be positive, got ", in.slots_per_rank);
  TORCH_CHECK_VALUE(in.capacity.has_value() == in.max_rows.has_value(),
                    kOp,
                    ": capacity and max_rows go together, got only ",
                    in.capacity ? "capacity" : "max_rows");
  const Sizes sizes{.num_ranks = num_ranks,
                    .ranks_per_node = in.ranks_per_node == 0 ? num_ranks : in.ranks_per_node,
                    .capacity = given_size("capacity", in.capacity),
                    .max_rows = given_size("max_rows", in.max_rows)};
  TORCH_CHECK_VALUE(sizes.ranks_per_node > 0 && num_ranks % sizes.ranks_per_node == 0,
                    kOp,
                    ": ranks_per_node must divide the group's ",
                    num_ranks,
                    " ranks, got ",
                    in.ranks_per_node);
  // Kernels count the choices of all tokens, here and where they arrive, in 32 bits.
  const std::int64_t top_k = in.topk_ids.size(1);
  TORCH_CHECK_VALUE(in.topk_ids.numel() <= kMaxRows && sizes.max_rows <= kMaxRows,
                    kOp,
                    ": ",
                    std::max(in.topk_ids.numel(), sizes.max_rows),
                    " rows do not fit into the int32 maps");
  TORCH_CHECK_VALUE(sizes.capacity <= kMaxRows / (num_ranks * top_k),
                    kOp,
                    ": capacity ",
                    sizes.capacity,
                    " of ",
                    num_ranks,
                    " ranks with ",
                    top_k,
                    " experts per token does not fit into the int32 maps");
  return sizes;
}

struct Routed {
  at::Tensor destinations, travel, counts, blank, overflow, counted;
};

/// `counts` [2, G, 2] in the exact form; `blank` [G * capacity, 2 K] and `overflow` in the fixed.
template <typename Device>
Routed route(const Inputs& in, const Sizes& sizes) {
  const Range range("route");
  const auto int32 = in.x.options().dtype(at::kInt);
  const std::int64_t num_tokens = in.topk_ids.size(0);
  const std::int64_t top_k = in.topk_ids.size(1);
  const std::int64_t num_ranks = sizes.num_ranks;
  const std::int64_t num_destinations = std::min(top_k, num_ranks);
  const std::int64_t num_counted =
      1 + num_ranks + sizes.num_nodes() + num_ranks * in.slots_per_rank;
  Routed out;
  out.destinations = at::empty({num_tokens, num_destinations}, int32);
  out.travel = at::empty({num_tokens, 2 * top_k}, int32);
  out.overflow = at::empty({in.fixed() ? 1 : 0}, int32);
  out.counted = at::zeros({in.counts ? num_counted : 0}, int32.dtype(at::kLong));
  if (in.fixed()) {
    out.blank = at::empty({num_ranks * sizes.capacity, 2 * top_k}, int32);
  } else {
    out.counts = at::zeros({2, num_ranks, 2}, int32);
  }
  with_id_type(in.topk_ids, [&]<typename Id>() {
    Device::route(RouteArgs<Id>{
        .topk_ids = in.topk_ids.const_data_ptr<Id>(),
        .weights = in.weights.const_data_ptr<float>(),
        .candidates = in.candidates.const_data_ptr<std::int32_t>(),
        .num_candidates = in.num_candidates.const_data_ptr<std::int32_t>(),
        .destinations = out.destinations.mutable_data_ptr<std::int32_t>(),
        .travel = out.travel.mutable_data_ptr<std::int32_t>(),
        .counts = in.fixed() ? nullptr : out.counts.mutable_data_ptr<std::int32_t>(),
        .counters = in.counts ? out.counted.mutable_data_ptr<std::int64_t>() : nullptr,
        .blank = in.fixed() ? out.blank.mutable_data_ptr<std::int32_t>() : nullptr,
        .overflow = in.fixed() ? out.overflow.mutable_data_ptr<std::int32_t>() : nullptr,
        .blank_size = in.fixed() ? out.blank.numel() : 0,
        .num_tokens = num_tokens,
        .top_k = top_k,
        .num_experts = in.candidates.size(0),
        .max_candidates = in.candidates.size(1),
        .slots_per_rank = in.slots_per_rank,
        .num_ranks = num_ranks,
        .ranks_per_node = sizes.ranks_per_node,
        .num_destinations = num_destinations,
    });
  });
  return out;
}

struct Permuted {
  at::Tensor rows, row_map, end_offsets;
};

/// What the two permutations of a dispatch differ in.
struct Layout {
  std::int64_t num_experts, num_rows, capacity;
  at::Tensor travel = {};       // [T, 2 K], goes along to
  at::Tensor sent_travel = {};  // [num_rows, 2 K]
  at::Tensor overflow = {};
};

template <typename Device>
Permuted permute(const at::Tensor& x, const at::Tensor& ids, const Layout& layout) {
  const Permuted out{at::empty({layout.num_rows, x.size(1)}, x.options()),
                     at::empty(ids.sizes(), ids.options()),
                     at::empty({layout.num_experts}, ids.options())};
  const auto data = [](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.mutable_data_ptr<std::int32_t>() : nullptr;
  };
  Device::permute(
      {.x = x.const_data_ptr(),
       .scales = data(layout.travel),
       .topk_ids = ids.const_data_ptr<std::int32_t>(),
       .expert_map = nullptr,
       .rows = out.rows.mutable_data_ptr(),
       .row_scales = data(layout.sent_travel),
       .row_map = out.row_map.mutable_data_ptr<std::int32_t>(),
       .end_offsets = out.end_offsets.mutable_data_ptr<std::int32_t>(),
       .workspace = nullptr,
       .num_tokens = ids.size(0),
       .top_k = ids.size(1),
       .num_ids = layout.num_experts,
       .num_experts = layout.num_experts,
       .num_rows = layout.num_rows,
       .row_bytes = x.size(1) * x.element_size(),
       .scale_bytes =
           layout.travel.defined() ? layout.travel.size(1) * layout.travel.element_size() : 0,
       .alignment = 1,
       .counters = {},
       .capacity = layout.capacity,
       .overflow = data(layout.overflow),
       .clears = false},
      x);
  return out;
}

/// Rows and choices to and from each rank, once on the host.
struct Counts {
  at::Tensor splits;             // [2, G]
  std::int64_t num_choices = 0;  // received

  Counts(const Wire& wire, const at::Tensor& counts, std::int64_t top_k) {
    wire.exchange_into(counts[1], counts[0], {}, {});
    const at::Tensor on_host = counts.cpu();
    splits = on_host.select(2, 0).to(at::kLong).contiguous();
    num_choices = on_host[1].select(1, 1).sum().item<std::int64_t>();
    TORCH_CHECK_VALUE(splits[1].sum().item<std::int64_t>() <= kMaxRows / top_k,
                      kOp,
                      ": more rows arrive than fit into the int32 maps");
  }
};

/// What the wire carries, on both of its sides.
struct Travelling {
  at::Tensor rows, travel;
};

/// Counted into in the fixed form alone: in the exact one every row finds room.
at::Tensor overflow_of(const Inputs& in, const Routed& routed) {
  return in.fixed() ? routed.overflow : at::Tensor();
}

/// Rows to the wire.
template <typename Device>
Permuted pack(const Inputs& in, const Routed& routed, const Sizes& sizes, Travelling& sent) {
  const Range range("pack");
  const std::int64_t num_rows =
      in.fixed() ? sizes.num_ranks * sizes.capacity : in.x.size(0) * routed.destinations.size(1);
  sent.travel = in.fixed() ? routed.blank
                           : at::empty({num_rows, routed.travel.size(1)}, routed.travel.options());
  const Permuted packed = permute<Device>(in.x,
                                          routed.destinations,
                                          {.num_experts = sizes.num_ranks,
                                           .num_rows = num_rows,
                                           .capacity = sizes.capacity,
                                           .travel = routed.travel,
                                           .sent_travel = sent.travel,
                                           .overflow = overflow_of(in, routed)});
  sent.rows = packed.rows;
  return packed;
}

Travelling send(const Wire& wire, const Travelling& sent, const Splits& shares) {
  const Range range("send");
  const std::int64_t num_rows = shares.num_sent(sent.rows.size(0));
  const auto exchange = [&](const at::Tensor& rows) {
    return wire.exchange(rows.narrow(0, 0, num_rows), shares.sent, shares.received);
  };
  return {exchange(sent.rows), exchange(sent.travel)};
}

/// Rows to the experts: fills `out` but for what pack knows.
template <typename Device>
void place(const Inputs& in,
           const Travelling& received,
           const Layout& layout,
           std::int64_t rank,
           Dispatched& out) {
  const Range range("place");
  const std::int64_t num_rows = received.rows.size(0);
  const std::int64_t top_k = in.topk_ids.size(1);
  const at::Tensor slots = at::empty({num_rows, top_k}, received.travel.options());
  out.recv_weights = at::empty({num_rows, top_k}, in.weights.options());
  Device::unpack({.travel = received.travel.const_data_ptr<std::int32_t>(),
                  .slots = slots.mutable_data_ptr<std::int32_t>(),
                  .weights = out.recv_weights.template mutable_data_ptr<float>(),
                  .num_rows = num_rows,
                  .top_k = top_k,
                  .first_slot = rank * in.slots_per_rank,
                  .slots_per_rank = in.slots_per_rank});
  const Permuted placed = permute<Device>(received.rows, slots, layout);
  out.rows = placed.rows;
  out.recv_map = placed.row_map;
  out.end_offsets = placed.end_offsets;
}

template <typename Device>
Dispatched dispatch(const Inputs& in) {
  check(in);
  const Wire wire(kOp, in.group_name);
  const Sizes sizes = check_sizes(in, wire.num_ranks());
  Device::check_limits(in, sizes.num_ranks);
  const Routed routed = route<Device>(in, sizes);
  Travelling sent;
  const Permuted packed = pack<Device>(in, routed, sizes, sent);

  Dispatched out;
  out.send_map = packed.row_map;
  out.overflow = routed.overflow;
  out.counted = routed.counted;
  out.splits = at::empty({0}, at::TensorOptions().dtype(at::kLong));
  std::int64_t num_rows = sizes.max_rows;
  if (!in.fixed()) {
    const Counts counts(wire, routed.counts, in.topk_ids.size(1));
    out.splits = counts.splits;
    num_rows = counts.num_choices;
  }
  const Travelling received = send(wire, sent, Splits(kOp, out.splits, sizes.num_ranks));
  const Layout layout{.num_experts = in.slots_per_rank,
                      .num_rows = num_rows,
                      .capacity = 0,
                      .overflow = overflow_of(in, routed)};
  place<Device>(in, received, layout, wire.rank(), out);
  return out;
}

}  // namespace

#ifdef MOETUNER_WITH_CUDA
Dispatched dispatch_cuda(const Inputs& in) {
  const c10::DeviceGuard guard(in.x.device());
  return dispatch<Cuda>(in);
}
#endif

Dispatched dispatch_cpu(const Inputs& in) { return dispatch<Cpu>(in); }

}  // namespace moetuner
