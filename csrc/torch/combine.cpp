#include "autograd.h"
#include "path.h"
#include "peer_exchange.h"
#include "routing_args.h"
#include "saved_trail.h"
#include "unpermute_ops.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

// The way back of `dispatch`, made of `unpermute` and the wire, on every device alike:
//
//     combine            weighted sums at the experts' rank, the wire, sums at home
//     combine_backward   a token's gradient to its rows at the experts' ranks
//     resend             rows of tokens, other than those dispatched, the same way
//     dispatch_backward  gradients of what `dispatch` sent, rows and weights, to their tokens

namespace moetuner {
namespace {

using T = at::Tensor;
using Two = std::tuple<T, T>;
using Names = std::vector<std::string>;

void check_recv_map(const char* op, const T& map) {
  TORCH_CHECK_VALUE(map.dim() == 2, op, ": recv_map must be 2-D, got ", map.sizes());
  TORCH_CHECK_TYPE(
      map.scalar_type() == at::kInt, op, ": recv_map must be int32, got ", map.scalar_type());
}

#ifdef MOETUNER_WITH_CUDA
/// What `unpermute` checks where the kernels of peers take its place.
void check_sum(const char* op,
               const T& rows,
               const T& recv_map,
               const OptionalTensor& recv_weights) {
  TORCH_CHECK_VALUE(rows.dim() == 2, op, ": rows must be 2-D, got ", rows.sizes());
  check_contiguous(op, "rows", rows);
  check_contiguous(op, "recv_map", recv_map);
  check_device(op, "recv_map", recv_map, "rows", rows);
  if (!recv_weights) return;
  TORCH_CHECK_VALUE(recv_weights->sizes() == recv_map.sizes(),
                    op,
                    ": recv_weights must be ",
                    recv_map.sizes(),
                    " like recv_map, got ",
                    recv_weights->sizes());
  TORCH_CHECK_TYPE(recv_weights->scalar_type() == at::kFloat,
                   op,
                   ": recv_weights must be float32, got ",
                   recv_weights->scalar_type());
  check_contiguous(op, "recv_weights", *recv_weights);
  check_device(op, "recv_weights", *recv_weights, "rows", rows);
}
#endif

/// Sums of rows here, or of `rows` by lines as they are, at home.
T bring_home(const Trail& trail,
             const T& rows,
             const T& recv_map,
             const OptionalTensor& recv_weights,
             bool by_lines) {
#ifdef MOETUNER_WITH_CUDA
  if (goes_over_peers(trail.op(), rows, trail.last().group)) {
    check_sum(trail.op(), rows, recv_map, recv_weights);
    const T sums = sum_over_peers(trail.op(), rows, recv_map, recv_weights, by_lines, trail.last());
    return trail.home(sums, trail.num_hops() - 1);
  }
#endif
  return trail.home(by_lines ? rows : sum_rows(rows, recv_map, recv_weights), trail.num_hops());
}

/// A row for each token to all lines where its rows arrived.
T carry_out(const Trail& trail, const T& rows, const T& recv_map) {
#ifdef MOETUNER_WITH_CUDA
  if (goes_over_peers(trail.op(), rows, trail.last().group)) {
    const T arrived = trail.out(rows, trail.num_hops() - 1, recv_map.size(0));
    return resend_over_peers(trail.op(), arrived, recv_map, trail.last());
  }
#endif
  return trail.out(rows, trail.num_hops(), recv_map.size(0));
}

T combine(const T& rows,
          const T& recv_map,
          const OptionalTensor& recv_weights,
          at::TensorList send_maps,
          at::TensorList splits,
          Names groups) {
  constexpr const char* kOp = "combine";
  check_recv_map(kOp, recv_map);
  return bring_home({kOp, groups, send_maps, splits}, rows, recv_map, recv_weights, false);
}

/// Rows of tokens to all lines where theirs arrived, by the maps of their dispatch.
T resend(const T& rows,
         const T& recv_map,
         at::TensorList send_maps,
         at::TensorList splits,
         Names groups) {
  constexpr const char* kOp = "resend";
  check_recv_map(kOp, recv_map);
  check_contiguous(kOp, "rows", rows);
  return carry_out({kOp, groups, send_maps, splits}, rows, recv_map);
}

Two combine_backward(const T& grad_out,
                     const T& recv_map,
                     const OptionalTensor& recv_weights,
                     at::TensorList send_maps,
                     at::TensorList splits,
                     Names groups,
                     std::int64_t num_rows,
                     const OptionalTensor& rows) {
  constexpr const char* kOp = "combine_backward";
  check_recv_map(kOp, recv_map);
  const T arrived = carry_out({kOp, groups, send_maps, splits}, grad_out, recv_map);
  return scatter_rows(arrived, recv_map, num_rows, recv_weights, rows);
}

/// One op for both, so that no compiler may turn their order round on some rank: absent where not
/// wanted, and then empty.
Two dispatch_backward(const OptionalTensor& grad_rows,
                      const OptionalTensor& grad_weights,
                      const T& recv_map,
                      at::TensorList send_maps,
                      at::TensorList splits,
                      Names groups) {
  constexpr const char* kOp = "dispatch_backward";
  check_recv_map(kOp, recv_map);
  const Trail trail(kOp, groups, send_maps, splits);
  Two out{at::empty({0}, recv_map.options()), at::empty({0}, recv_map.options())};
  if (grad_rows) std::get<0>(out) = bring_home(trail, *grad_rows, recv_map, {}, false);
  if (grad_weights) {
    TORCH_CHECK_VALUE(grad_weights->sizes() == recv_map.sizes(),
                      kOp,
                      ": grad_weights must be ",
                      recv_map.sizes(),
                      " like recv_map, got ",
                      grad_weights->sizes());
    check_contiguous(kOp, "grad_weights", *grad_weights);
    std::get<1>(out) = bring_home(trail, *grad_weights, recv_map, {}, true);
  }
  return out;
}

using torch::autograd::variable_list;

T call_combine(const T& rows,
               const T& recv_map,
               const OptionalTensor& recv_weights,
               at::TensorList send_maps,
               at::TensorList splits,
               const Names& groups) {
  using Signature =
      T(const T&, const T&, const OptionalTensor&, at::TensorList, at::TensorList, Names);
  static const auto op = find_op<Signature>("moetuner::combine");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(rows, recv_map, recv_weights, send_maps, splits, groups);
}

class Combine : public torch::autograd::Function<Combine> {
 public:
  static T forward(torch::autograd::AutogradContext* context,
                   const T& rows,
                   const T& recv_map,
                   const OptionalTensor& recv_weights,
                   const std::vector<T>& send_maps,
                   const std::vector<T>& splits,
                   const Names& groups) {
    // Rows are kept only where the weights' gradient needs them.
    const bool keeps_rows = recv_weights && recv_weights->requires_grad();
    save_trail(context,
               {recv_map, recv_weights.value_or(T()), keeps_rows ? rows : T()},
               send_maps,
               splits,
               groups);
    context->saved_data["num_rows"] = rows.sym_size(0);
    return call_combine(rows, recv_map, recv_weights, send_maps, splits, groups);
  }

  static variable_list backward(torch::autograd::AutogradContext* context,
                                const variable_list& grads) {
    using Signature = Two(const T&,
                          const T&,
                          const OptionalTensor&,
                          at::TensorList,
                          at::TensorList,
                          Names,
                          c10::SymInt,
                          const OptionalTensor&);
    static const auto op = find_op<Signature>("moetuner::combine_backward");
    const SavedTrail saved(context, 3);
    const auto [grad_rows, grad_weights] = op.call(grads[0].contiguous(),
                                                   saved.others[0],
                                                   given(saved.others[1]),
                                                   saved.send_maps,
                                                   saved.splits,
                                                   saved.groups,
                                                   context->saved_data["num_rows"].toSymInt(),
                                                   given(saved.others[2]));
    variable_list result(6);
    result[0] = grad_rows;
    if (saved.others[2].defined()) result[2] = grad_weights;
    return result;
  }
};

T combine_autograd(const T& rows,
                   const T& recv_map,
                   const OptionalTensor& recv_weights,
                   at::TensorList send_maps,
                   at::TensorList splits,
                   Names groups) {
  if (!needs_gradient(rows) && !needs_gradient(recv_weights)) {
    return call_combine(rows, recv_map, recv_weights, send_maps, splits, groups);
  }
  return Combine::apply(rows, recv_map, recv_weights, send_maps.vec(), splits.vec(), groups);
}

void implement(torch::Library& m) {
  m.impl("combine", &combine);
  m.impl("resend", &resend);
  m.impl("combine_backward", &combine_backward);
  m.impl("dispatch_backward", &dispatch_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moetuner, m) {
  m.def(
      "combine(Tensor rows, Tensor recv_map, Tensor? recv_weights, Tensor[] send_maps, "
      "Tensor[] splits, str[] groups) -> Tensor");
  m.def(
      "resend(Tensor rows, Tensor recv_map, Tensor[] send_maps, Tensor[] splits, str[] groups) "
      "-> Tensor");
  m.def(
      "combine_backward(Tensor grad_out, Tensor recv_map, Tensor? recv_weights, "
      "Tensor[] send_maps, Tensor[] splits, str[] groups, SymInt num_rows, Tensor? rows=None) "
      "-> (Tensor grad_rows, Tensor grad_recv_weights)");
  m.def(
      "dispatch_backward(Tensor? grad_rows, Tensor? grad_recv_weights, Tensor recv_map, "
      "Tensor[] send_maps, Tensor[] splits, str[] groups) -> (Tensor grad_x, "
      "Tensor grad_weights)");
}

TORCH_LIBRARY_IMPL(moetuner, CPU, m) { implement(m); }

#ifdef MOETUNER_WITH_CUDA
TORCH_LIBRARY_IMPL(moetuner, CUDA, m) { implement(m); }
#endif

TORCH_LIBRARY_IMPL(moetuner, Autograd, m) {
  m.impl("combine", &combine_autograd);
  m.impl("resend", torch::autograd::autogradNotImplementedFallback());
  m.impl("combine_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("dispatch_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace moetuner
