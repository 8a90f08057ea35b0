#include "moetuner/ops/permute.h"

#include "autograd.h"
#include "routing_args.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#ifdef MOETUNER_WITH_CUDA
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

// Three overloads of one operation: the plain one is functional and differentiable, `counted` adds
// to routing counters in the same pass, `scaled` carries the scales of FP8 rows along (and may
// count too).

namespace moetuner {
namespace {

constexpr const char* kOp = "permute";

struct Outputs {
  at::Tensor rows, row_map, end_offsets, row_scales;
};
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct Inputs {
  const at::Tensor& x;
  const at::Tensor& topk_ids;
  std::int64_t num_experts;
  const OptionalTensor& expert_map;
  std::int64_t alignment;
  OptionalTensor scales = {};
  Counters counters = {};

  std::int64_t num_ids() const { return expert_map ? expert_map->size(0) : num_experts; }
};

void check(const Inputs& in) {
  const auto& [x, topk_ids, num_experts, expert_map, alignment, scales, counters] = in;
  check_tokens(kOp, x, topk_ids);
  TORCH_CHECK_VALUE(num_experts > 0, kOp, ": num_experts must be positive, got ", num_experts);
  TORCH_CHECK_VALUE(alignment > 0, kOp, ": alignment must be positive, got ", alignment);
  TORCH_CHECK_VALUE(
      alignment <= kMaxRows, kOp, ": alignment must be at most ", kMaxRows, ", got ", alignment);
  if (expert_map) {
    TORCH_CHECK_VALUE(
        expert_map->dim() == 1, kOp, ": expert_map must be [experts], got ", expert_map->sizes());
    TORCH_CHECK_TYPE(expert_map->scalar_type() == at::kInt,
                     kOp,
                     ": expert_map must be int32, got ",
                     expert_map->scalar_type());
    check_contiguous(kOp, "expert_map", *expert_map);
    check_device(kOp, "expert_map", *expert_map, "x", x);
  }
  if (scales) {
    TORCH_CHECK_VALUE(scales->dim() == 2 && scales->size(0) == x.size(0),
                      kOp,
                      ": scales must be [",
                      x.size(0),
                      ", scales per token], got ",
                      scales->sizes());
    check_contiguous(kOp, "scales", *scales);
    check_device(kOp, "scales", *scales, "x", x);
  }
  check_counters(kOp, topk_ids, counters);
  TORCH_CHECK_VALUE(!counters.load || counters.load->size(0) == in.num_ids(),
                    kOp,
                    ": load must be [",
                    in.num_ids(),
                    "], one for each id, got ",
                    counters.load->sizes());
}

/// Rows that are enough whatever the routing: each expert that is chosen wastes less than
/// `alignment`. The fake in ops/permute.py says the same.
std::int64_t num_rows(const Inputs& in) {
  const std::int64_t choices = in.topk_ids.numel();
  std::int64_t padded = choices;
  if (choices <= kMaxRows) padded += std::min(in.num_experts, choices) * (in.alignment - 1);
  TORCH_CHECK_VALUE(
      padded <= kMaxRows, kOp, ": ", padded, " rows do not fit into the int32 row_map");
  return padded / in.alignment * in.alignment;
}

Outputs allocate(const Inputs& in) {
  const std::int64_t rows = num_rows(in);
  const auto int32 = in.x.options().dtype(at::kInt);
  return {
      .rows = at::empty({rows, in.x.size(1)}, in.x.options()),
      .row_map = at::empty(in.topk_ids.sizes(), int32),
      .end_offsets = at::empty({in.num_experts}, int32),
      .row_scales =
          in.scales ? at::empty({rows, in.scales->size(1)}, in.scales->options()) : at::Tensor(),
  };
}

template <typename Id>
PermuteArgs<Id> pack(const Inputs& in, const Outputs& out, std::int32_t* workspace) {
  return {
      .x = in.x.const_data_ptr(),
      .scales = in.scales ? in.scales->const_data_ptr() : nullptr,
      .topk_ids = in.topk_ids.const_data_ptr<Id>(),
      .expert_map = in.expert_map ? in.expert_map->const_data_ptr<std::int32_t>() : nullptr,
      .rows = out.rows.mutable_data_ptr(),
      .row_scales = in.scales ? out.row_scales.mutable_data_ptr() : nullptr,
      .row_map = out.row_map.mutable_data_ptr<std::int32_t>(),
      .end_offsets = out.end_offsets.mutable_data_ptr<std::int32_t>(),
      .workspace = workspace,
      .num_tokens = in.topk_ids.size(0),
      .top_k = in.topk_ids.size(1),
      .num_ids = in.num_ids(),
      .num_experts = in.num_experts,
      .num_rows = out.rows.size(0),
      .row_bytes = in.x.size(1) * in.x.element_size(),
      .scale_bytes = in.scales ? in.scales->size(1) * in.scales->element_size() : 0,
      .alignment = in.alignment,
      .counters = moetuner::pack<Id>(in.topk_ids, in.counters),
  };
}

Outputs permute_cpu(const Inputs& in) {
  check(in);
  Outputs out = allocate(in);
  with_id_type(in.topk_ids, [&]<typename Id>() { cpu::permute(pack<Id>(in, out, nullptr)); });
  return out;
}

#ifdef MOETUNER_WITH_CUDA
Outputs permute_cuda(const Inputs& in) {
  const c10::DeviceGuard guard(in.x.device());
  check(in);
  TORCH_CHECK_VALUE(in.num_experts <= cuda::kMaxPermuteExperts,
                    kOp,
                    ": num_experts must be at most ",
                    cuda::kMaxPermuteExperts,
                    " on CUDA, got ",
                    in.num_experts);
  TORCH_CHECK_VALUE(in.topk_ids.size(1) <= cuda::kMaxPermuteTopK,
                    kOp,
                    ": topk_ids may have at most ",
                    cuda::kMaxPermuteTopK,
                    " experts per token on CUDA, got ",
                    in.topk_ids.size(1));
  Outputs out = allocate(in);
  at::Tensor workspace;
  const std::int64_t size =
      cuda::permute_workspace(in.topk_ids.size(0), in.topk_ids.size(1), in.num_experts);
  if (size > 0) workspace = at::empty({size}, out.row_map.options());
  with_id_type(in.topk_ids, [&]<typename Id>() {
    auto* memory = size > 0 ? workspace.mutable_data_ptr<std::int32_t>() : nullptr;
    cuda::permute(pack<Id>(in, out, memory), c10::cuda::getCurrentCUDAStream());
  });
  return out;
}
#endif

/// The three overloads on the device of `run`.
template <Outputs (*run)(const Inputs&)>
struct Overloads {
  static Three plain(const at::Tensor& x,
                     const at::Tensor& topk_ids,
                     std::int64_t num_experts,
                     const OptionalTensor& expert_map,
                     std::int64_t alignment) {
    const Outputs out = run({x, topk_ids, num_experts, expert_map, alignment});
    return {out.rows, out.row_map, out.end_offsets};
  }

  static Three counted(const at::Tensor& x,
                       const at::Tensor& topk_ids,
                       std::int64_t num_experts,
                       const OptionalTensor& expert_map,
                       std::int64_t alignment,
                       at::Tensor load,
                       OptionalTensor coactivation,
                       const OptionalTensor& previous_topk_ids,
                       OptionalTensor transitions) {
    const Counters counters{load, coactivation, previous_topk_ids, transitions};
    const Outputs out = run({x, topk_ids, num_experts, expert_map, alignment, {}, counters});
    return {out.rows, out.row_map, out.end_offsets};
  }

  static Four scaled(const at::Tensor& x,
                     const at::Tensor& topk_ids,
                     std::int64_t num_experts,
                     const OptionalTensor& expert_map,
                     std::int64_t alignment,
                     const at::Tensor& scales,
                     OptionalTensor load,
                     OptionalTensor coactivation,
                     const OptionalTensor& previous_topk_ids,
                     OptionalTensor transitions) {
    const Counters counters{load, coactivation, previous_topk_ids, transitions};
    const Outputs out = run({x, topk_ids, num_experts, expert_map, alignment, scales, counters});
    return {out.rows, out.row_map, out.end_offsets, out.row_scales};
  }

  static void implement(torch::Library& m) {
    m.impl("permute", &plain);
    m.impl("permute.counted", &counted);
    m.impl("permute.scaled", &scaled);
  }
};

using torch::autograd::variable_list;

/// Calls below autograd.
Three call_plain(const at::Tensor& x,
                 const at::Tensor& topk_ids,
                 const c10::SymInt& num_experts,
                 const OptionalTensor& expert_map,
                 std::int64_t alignment) {
  using Signature =
      Three(const at::Tensor&, const at::Tensor&, c10::SymInt, const OptionalTensor&, std::int64_t);
  static const auto op = find_op<Signature>("moetuner::permute");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x, topk_ids, num_experts, expert_map, alignment);
}

Three call_counted(const at::Tensor& x,
                   const at::Tensor& topk_ids,
                   const c10::SymInt& num_experts,
                   const OptionalTensor& expert_map,
                   std::int64_t alignment,
                   const Counters& counters) {
  using Signature = Three(const at::Tensor&,
                          const at::Tensor&,
                          c10::SymInt,
                          const OptionalTensor&,
                          std::int64_t,
                          at::Tensor,
                          OptionalTensor,
                          const OptionalTensor&,
                          OptionalTensor);
  static const auto op = find_op<Signature>("moetuner::permute", "counted");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x,
                 topk_ids,
                 num_experts,
                 expert_map,
                 alignment,
                 *counters.load,
                 counters.coactivation,
                 counters.previous_topk_ids,
                 counters.transitions);
}

/// A token's gradient is the sum of its rows': unpermute without weights.
class Permute : public torch::autograd::Function<Permute> {
 public:
  static variable_list forward(torch::autograd::AutogradContext* context,
                               const at::Tensor& x,
                               const at::Tensor& topk_ids,
                               const c10::SymInt& num_experts,
                               const OptionalTensor& expert_map,
                               std::int64_t alignment,
                               const Counters& counters) {
    const auto [rows, row_map, end_offsets] =
        counters.load ? call_counted(x, topk_ids, num_experts, expert_map, alignment, counters)
                      : call_plain(x, topk_ids, num_experts, expert_map, alignment);
    context->save_for_backward({row_map});
    context->mark_non_differentiable({row_map, end_offsets});
    return {rows, row_map, end_offsets};
  }

  static variable_list backward(torch::autograd::AutogradContext* context,
                                const variable_list& grads) {
    using Signature = at::Tensor(
        const at::Tensor&, const at::Tensor&, const OptionalTensor&, std::optional<c10::SymInt>);
    static const auto unpermute = find_op<Signature>("moetuner::unpermute");
    variable_list result(6);
    if (grads[0].defined()) {
      const at::Tensor row_map = context->get_saved_variables()[0];
      result[0] = unpermute.call(grads[0].contiguous(), row_map, {}, {});
    }
    return result;
  }
};

Three as_tuple(const variable_list& list) { return {list[0], list[1], list[2]}; }

Three permute_autograd(const at::Tensor& x,
                       const at::Tensor& topk_ids,
                       c10::SymInt num_experts,
                       const OptionalTensor& expert_map,
                       std::int64_t alignment) {
  if (!needs_gradient(x)) return call_plain(x, topk_ids, num_experts, expert_map, alignment);
  return as_tuple(Permute::apply(x, topk_ids, num_experts, expert_map, alignment, Counters{}));
}

Three permute_counted_autograd(const at::Tensor& x,
                               const at::Tensor& topk_ids,
                               c10::SymInt num_experts,
                               const OptionalTensor& expert_map,
                               std::int64_t alignment,
                               at::Tensor load,
                               OptionalTensor coactivation,
                               const OptionalTensor& previous_topk_ids,
                               OptionalTensor transitions) {
  const Counters counters{load, coactivation, previous_topk_ids, transitions};
  if (!needs_gradient(x)) {
    return call_counted(x, topk_ids, num_experts, expert_map, alignment, counters);
  }
  return as_tuple(Permute::apply(x, topk_ids, num_experts, expert_map, alignment, counters));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moetuner, m) {
  m.def(
      "permute(Tensor x, Tensor topk_ids, SymInt num_experts, Tensor? expert_map=None, "
      "int alignment=1) -> (Tensor rows, Tensor row_map, Tensor end_offsets)");
  m.def(
      "permute.counted(Tensor x, Tensor topk_ids, SymInt num_experts, Tensor? expert_map=None, "
      "int alignment=1, *, Tensor(a!) load, Tensor(b!)? coactivation=None, "
      "Tensor? previous_topk_ids=None, Tensor(c!)? transitions=None) "
      "-> (Tensor rows, Tensor row_map, Tensor end_offsets)");
  m.def(
      "permute.scaled(Tensor x, Tensor topk_ids, SymInt num_experts, Tensor? expert_map=None, "
      "int alignment=1, *, Tensor scales, Tensor(a!)? load=None, Tensor(b!)? coactivation=None, "
      "Tensor? previous_topk_ids=None, Tensor(c!)? transitions=None) "
      "-> (Tensor rows, Tensor row_map, Tensor end_offsets, Tensor row_scales)");
}

TORCH_LIBRARY_IMPL(moetuner, CPU, m) { Overloads<permute_cpu>::implement(m); }

#ifdef MOETUNER_WITH_CUDA
TORCH_LIBRARY_IMPL(moetuner, CUDA, m) { Overloads<permute_cuda>::implement(m); }
#endif

TORCH_LIBRARY_IMPL(moetuner, Autograd, m) {
  m.impl("permute", &permute_autograd);
  m.impl("permute.counted", &permute_counted_autograd);
  m.impl("permute.scaled", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace moetuner
