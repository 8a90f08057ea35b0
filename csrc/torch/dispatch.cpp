#include "autograd.h"
#include "dispatch_forward.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace moetuner {
namespace {

using T = at::Tensor;
using torch::autograd::variable_list;

/// The arguments of the op; `DispatchInputs` names them, and `Dispatched` what it returns.
using Signature = variable_list(const T&,
                                const T&,
                                const T&,
                                const T&,
                                const T&,
                                std::int64_t,
                                std::string,
                                std::optional<c10::SymInt>,
                                std::optional<c10::SymInt>,
                                std::int64_t,
                                bool);

/// `run`, which takes `DispatchInputs`, as a kernel of the op.
template <auto run, typename Op = Signature>
struct Kernel;

template <auto run, typename... Args>
struct Kernel<run, variable_list(Args...)> {
  static variable_list call(Args... args) { return run(DispatchInputs{args...}); }
};

/// The op below autograd.
variable_list call_dispatch(const DispatchInputs& in) {
  static const auto op = find_op<Signature>("moetuner::dispatch");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto& [x, ids, weights, table, num_candidates, slots, group, capacity, rows, node, counts] =
      in;
  return op.call(
      x, ids, weights, table, num_candidates, slots, group, capacity, rows, node, counts);
}

/// The gradient of a token is what `combine` makes of its rows' gradients without weights; that of
/// its weights travels back alike.
class Dispatch : public torch::autograd::Function<Dispatch> {
 public:
  static variable_list forward(torch::autograd::AutogradContext* context,
                               const T&,
                               const T&,
                               const DispatchInputs& in) {
    variable_list out = call_dispatch(in);
    context->save_for_backward({out[2], out[4], out[5]});
    context->saved_data["group_name"] = in.group_name;
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

variable_list differentiable(const DispatchInputs& in) {
  if (!needs_gradient(in.x) && !needs_gradient(in.weights)) return call_dispatch(in);
  return Dispatch::apply(in.x, in.weights, in);
}

variable_list on_cpu(const DispatchInputs& in) { return dispatch_cpu(in).as_list(); }

#ifdef MOETUNER_WITH_CUDA
variable_list on_cuda(const DispatchInputs& in) { return dispatch_cuda(in).as_list(); }
#endif

}  // namespace

// It returns a list, of which torch.compile finds the sizes that only a run knows. Of several
// outputs of an op with effects it does not (torch 2.13).
TORCH_LIBRARY_FRAGMENT(moetuner, m) {
  m.def(
      "dispatch(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor candidates, "
      "Tensor num_candidates, int slots_per_rank, str group_name, *, SymInt? capacity=None, "
      "SymInt? max_rows=None, int ranks_per_node=0, bool counts=False) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(moetuner, CPU, m) { m.impl("dispatch", &Kernel<on_cpu>::call); }

#ifdef MOETUNER_WITH_CUDA
TORCH_LIBRARY_IMPL(moetuner, CUDA, m) { m.impl("dispatch", &Kernel<on_cuda>::call); }
#endif

TORCH_LIBRARY_IMPL(moetuner, Autograd, m) { m.impl("dispatch", &Kernel<differentiable>::call); }

}  // namespace moetuner
