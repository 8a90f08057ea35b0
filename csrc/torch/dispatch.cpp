#include "autograd.h"
#include "dispatch_forward.h"
#include "saved_trail.h"

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
                                std::vector<std::string>,
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
  const auto& [x,
               ids,
               weights,
               table,
               num_candidates,
               slots,
               groups,
               capacity,
               rows,
               node,
               counts] = in;
  return op.call(
      x, ids, weights, table, num_candidates, slots, groups, capacity, rows, node, counts);
}

/// The gradient of a token is what `combine` makes of its rows' gradients without weights; that of
/// its weights travels back alike, in the same op.
class Dispatch : public torch::autograd::Function<Dispatch> {
 public:
  static variable_list forward(torch::autograd::AutogradContext* context,
                               const T&,
                               const T&,
                               const DispatchInputs& in) {
    variable_list out = call_dispatch(in);
    const auto maps = out.begin() + Dispatched::kNumFixed;
    const auto splits = maps + static_cast<std::ptrdiff_t>(in.groups.size());
    save_trail(context, {out[kRecvMap]}, {maps, splits}, {splits, out.end()}, in.groups);
    variable_list whole;
    for (std::size_t i = 0; i < out.size(); ++i) {
      if (i != kRows && i != kRecvWeights) whole.push_back(out[i]);
    }
    context->mark_non_differentiable(whole);
    return out;
  }

  static variable_list backward(torch::autograd::AutogradContext* context,
                                const variable_list& grads) {
    using BackwardSignature = std::tuple<T, T>(const OptionalTensor&,
                                               const OptionalTensor&,
                                               const T&,
                                               at::TensorList,
                                               at::TensorList,
                                               std::vector<std::string>);
    static const auto op = find_op<BackwardSignature>("moetuner::dispatch_backward");
    const SavedTrail saved(context, 1);
    const auto wanted = [&](std::size_t input, std::size_t output) {
      return context->needs_input_grad(input) ? OptionalTensor(grads[output].contiguous())
                                              : std::nullopt;
    };
    const OptionalTensor rows = wanted(0, kRows);
    const OptionalTensor weights = wanted(1, kRecvWeights);
    const auto [grad_x, grad_weights] =
        op.call(rows, weights, saved.others[0], saved.send_maps, saved.splits, saved.groups);
    return {rows ? grad_x : T(), weights ? grad_weights : T(), T()};
  }

 private:
  static constexpr std::size_t kRows = 0, kRecvMap = 2, kRecvWeights = 3;  // of `Dispatched`
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
      "Tensor num_candidates, int slots_per_rank, str[] groups, *, SymInt? capacity=None, "
      "SymInt? max_rows=None, int ranks_per_node=0, bool counts=False) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(moetuner, CPU, m) { m.impl("dispatch", &Kernel<on_cpu>::call); }

#ifdef MOETUNER_WITH_CUDA
TORCH_LIBRARY_IMPL(moetuner, CUDA, m) { m.impl("dispatch", &Kernel<on_cuda>::call); }
#endif

TORCH_LIBRARY_IMPL(moetuner, Autograd, m) { m.impl("dispatch", &Kernel<differentiable>::call); }

}  // namespace moetuner
