#include "autograd.h"
#include "dispatch_forward.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

// Two overloads of one operation: the plain one with exact sizes, `fixed` with those that it is
// given.

namespace moetuner {
namespace {

using T = at::Tensor;
using Six = std::tuple<T, T, T, T, T, T>;
using Seven = std::tuple<T, T, T, T, T, T, T>;

/// Both overloads on the device of `run`.
template <Dispatched (*run)(const DispatchInputs&)>
struct Overloads {
  static Six plain(const T& x,
                   const T& topk_ids,
                   const T& topk_weights,
                   const T& candidates,
                   const T& num_candidates,
                   std::int64_t slots_per_rank,
                   std::string group_name,
                   std::int64_t ranks_per_node,
                   OptionalTensor counters) {
    const Dispatched out = run({x,
                                topk_ids,
                                topk_weights,
                                candidates,
                                num_candidates,
                                slots_per_rank,
                                group_name,
                                ranks_per_node,
                                counters});
    return {out.rows, out.end_offsets, out.recv_map, out.recv_weights, out.send_map, out.splits};
  }

  static Seven fixed(const T& x,
                     const T& topk_ids,
                     const T& topk_weights,
                     const T& candidates,
                     const T& num_candidates,
                     std::int64_t slots_per_rank,
                     std::string group_name,
                     std::int64_t capacity,
                     std::int64_t max_rows,
                     std::int64_t ranks_per_node,
                     OptionalTensor counters) {
    TORCH_CHECK_VALUE(capacity > 0, kDispatchOp, ": capacity must be positive, got ", capacity);
    TORCH_CHECK_VALUE(max_rows > 0, kDispatchOp, ": max_rows must be positive, got ", max_rows);
    const Dispatched out = run({x,
                                topk_ids,
                                topk_weights,
                                candidates,
                                num_candidates,
                                slots_per_rank,
                                group_name,
                                ranks_per_node,
                                counters,
                                capacity,
                                max_rows});
    return {out.rows,
            out.end_offsets,
            out.recv_map,
            out.recv_weights,
            out.send_map,
            out.splits,
            out.overflow};
  }

  static void implement(torch::Library& m) {
    m.impl("dispatch", &plain);
    m.impl("dispatch.fixed", &fixed);
  }
};

using torch::autograd::variable_list;

/// Arguments as autograd sees them; sizes of the fixed form are absent in the exact one.
struct Call {
  const T& x;
  const T& topk_ids;
  const T& weights;
  const T& candidates;
  const T& num_candidates;
  std::int64_t slots_per_rank;
  const std::string& group_name;
  std::int64_t ranks_per_node;
  const OptionalTensor& counters;
  std::optional<c10::SymInt> capacity = {}, max_rows = {};

  /// Below autograd; the last output only in the fixed form.
  variable_list run() const {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (!capacity) {
      using Signature = Six(const T&,
                            const T&,
                            const T&,
                            const T&,
                            const T&,
                            std::int64_t,
                            std::string,
                            std::int64_t,
                            OptionalTensor);
      static const auto op = find_op<Signature>("moetuner::dispatch");
      const auto [a, b, c, d, e, f] = op.call(x,
                                              topk_ids,
                                              weights,
                                              candidates,
                                              num_candidates,
                                              slots_per_rank,
                                              group_name,
                                              ranks_per_node,
                                              counters);
      return {a, b, c, d, e, f};
    }
    using Signature = Seven(const T&,
                            const T&,
                            const T&,
                            const T&,
                            const T&,
                            std::int64_t,
                            std::string,
                            c10::SymInt,
                            c10::SymInt,
                            std::int64_t,
                            OptionalTensor);
    static const auto op = find_op<Signature>("moetuner::dispatch", "fixed");
    const auto [a, b, c, d, e, f, g] = op.call(x,
                                               topk_ids,
                                               weights,
                                               candidates,
                                               num_candidates,
                                               slots_per_rank,
                                               group_name,
                                               *capacity,
                                               *max_rows,
                                               ranks_per_node,
                                               counters);
    return {a, b, c, d, e, f, g};
  }
};

/// The gradient of a token is what `combine` makes of its rows' gradients without weights; that of
/// its weights travels back alike.
class Dispatch : public torch::autograd::Function<Dispatch> {
 public:
  static variable_list forward(torch::autograd::AutogradContext* context,
                               const T&,
                               const T&,
                               const Call& call) {
    variable_list out = call.run();
    context->save_for_backward({out[2], out[4], out[5]});
    context->saved_data["group_name"] = call.group_name;
    variable_list whole(out.begin() + 4, out.end());
    whole.push_back(out[1]);
    whole.push_back(out[2]);
    context->mark_non_differentiable(whole);
    return out;
  }

  static variable_list backward(torch::autograd::AutogradContext* context,
                                const variable_list& grads) {
    using CombineSignature =
        T(const T&, const T&, const OptionalTensor&, const T&, const T&, std::string);
    using SendBackSignature = T(const T&, const T&, const T&, std::string);
    static const auto combine = find_op<CombineSignature>("moetuner::combine");
    static const auto send_back = find_op<SendBackSignature>("moetuner::send_back");
    const auto saved = context->get_saved_variables();
    const std::string group = context->saved_data["group_name"].toStringRef();
    variable_list result(3);
    if (context->needs_input_grad(0)) {
      result[0] = combine.call(grads[0].contiguous(), saved[0], {}, saved[1], saved[2], group);
    }
    if (context->needs_input_grad(1)) {
      result[1] = send_back.call(grads[3].contiguous(), saved[1], saved[2], group);
    }
    return result;
  }
};

variable_list apply(const Call& call) {
  if (!needs_gradient(call.x) && !needs_gradient(call.weights)) return call.run();
  return Dispatch::apply(call.x, call.weights, call);
}

Six plain_autograd(const T& x,
                   const T& topk_ids,
                   const T& topk_weights,
                   const T& candidates,
                   const T& num_candidates,
                   std::int64_t slots_per_rank,
                   std::string group_name,
                   std::int64_t ranks_per_node,
                   OptionalTensor counters) {
  const auto o = apply({x,
                        topk_ids,
                        topk_weights,
                        candidates,
                        num_candidates,
                        slots_per_rank,
                        group_name,
                        ranks_per_node,
                        counters});
  return {o[0], o[1], o[2], o[3], o[4], o[5]};
}

Seven fixed_autograd(const T& x,
                     const T& topk_ids,
                     const T& topk_weights,
                     const T& candidates,
                     const T& num_candidates,
                     std::int64_t slots_per_rank,
                     std::string group_name,
                     c10::SymInt capacity,
                     c10::SymInt max_rows,
                     std::int64_t ranks_per_node,
                     OptionalTensor counters) {
  const auto o = apply({x,
                        topk_ids,
                        topk_weights,
                        candidates,
                        num_candidates,
                        slots_per_rank,
                        group_name,
                        ranks_per_node,
                        counters,
                        capacity,
                        max_rows});
  return {o[0], o[1], o[2], o[3], o[4], o[5], o[6]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moetuner, m) {
  m.def(
      "dispatch(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor candidates, "
      "Tensor num_candidates, int slots_per_rank, str group_name, *, int ranks_per_node=0, "
      "Tensor(a!)? counters=None) -> (Tensor rows, Tensor end_offsets, Tensor recv_map, "
      "Tensor recv_weights, Tensor send_map, Tensor splits)");
  m.def(
      "dispatch.fixed(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor candidates, "
      "Tensor num_candidates, int slots_per_rank, str group_name, *, SymInt capacity, "
      "SymInt max_rows, int ranks_per_node=0, Tensor(a!)? counters=None) -> (Tensor rows, "
      "Tensor end_offsets, Tensor recv_map, Tensor recv_weights, Tensor send_map, Tensor splits, "
      "Tensor overflow)");
}

TORCH_LIBRARY_IMPL(moetuner, CPU, m) { Overloads<dispatch_cpu>::implement(m); }

#ifdef MOETUNER_WITH_CUDA
TORCH_LIBRARY_IMPL(moetuner, CUDA, m) { Overloads<dispatch_cuda>::implement(m); }
#endif

TORCH_LIBRARY_IMPL(moetuner, Autograd, m) {
  m.impl("dispatch", &plain_autograd);
  m.impl("dispatch.fixed", &fixed_autograd);
}

}  // namespace moetuner
