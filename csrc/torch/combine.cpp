#include "autograd.h"
#include "ranges.h"
#include "routing_args.h"
#include "wire.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <numeric>
#include <tuple>

// The way back of `dispatch`, made of `unpermute` and the wire, on every device alike:
//
//     combine           weighted sums at the experts' rank, the wire, sums at home
//     send_back         the wire and the sums at home alone: gradients of what `dispatch` sent
//     combine_backward  a token's gradient to its rows at the experts' ranks

namespace moetuner {
namespace {

using Two = std::tuple<at::Tensor, at::Tensor>;

at::Tensor sum_rows(const at::Tensor& rows,
                    const at::Tensor& row_map,
                    const OptionalTensor& weights) {
  using Signature = at::Tensor(
      const at::Tensor&, const at::Tensor&, const OptionalTensor&, std::optional<std::int64_t>);
  static const auto op = find_op<Signature>("moetuner::unpermute");
  return op.call(rows, row_map, weights, {});
}

Two scatter_rows(const at::Tensor& grad,
                 const at::Tensor& row_map,
                 std::int64_t num_rows,
                 const OptionalTensor& weights,
                 const OptionalTensor& rows) {
  using Signature = Two(const at::Tensor&,
                        const at::Tensor&,
                        std::int64_t,
                        const OptionalTensor&,
                        const OptionalTensor&);
  static const auto op = find_op<Signature>("moetuner::unpermute_backward");
  return op.call(grad, row_map, num_rows, weights, rows);
}

void check_map(const char* op, const char* name, const at::Tensor& map) {
  TORCH_CHECK_VALUE(map.dim() == 2, op, ": ", name, " must be 2-D, got ", map.sizes());
  TORCH_CHECK_TYPE(
      map.scalar_type() == at::kInt, op, ": ", name, " must be int32, got ", map.scalar_type());
}

at::Tensor travel_back(const char* op,
                       const at::Tensor& received,
                       const at::Tensor& send_map,
                       const at::Tensor& splits,
                       const std::string& group_name) {
  const Wire wire(op, group_name);
  check_map(op, "send_map", send_map);
  Splits rows(op, splits, wire.num_ranks());
  const std::int64_t wanted =
      std::accumulate(rows.received.begin(), rows.received.end(), std::int64_t{0});
  TORCH_CHECK_VALUE(splits.numel() == 0 || received.size(0) == wanted,
                    op,
                    ": splits say that ",
                    wanted,
                    " rows were received, got ",
                    received.size(0));
  TORCH_CHECK_VALUE(splits.numel() > 0 || received.size(0) % wire.num_ranks() == 0,
                    op,
                    ": ",
                    received.size(0),
                    " rows cannot be shared equally by ",
                    wire.num_ranks(),
                    " ranks");
  at::Tensor returned;
  {
    const Range range("return");
    returned = wire.exchange(received, rows.received, rows.sent);
  }
  const Range range("sum");
  return sum_rows(returned, send_map, {});
}

at::Tensor send_back(const at::Tensor& received,
                     const at::Tensor& send_map,
                     const at::Tensor& splits,
                     std::string group_name) {
  constexpr const char* kOp = "send_back";
  TORCH_CHECK_VALUE(
      received.dim() == 2, kOp, ": received must be [rows, values], got ", received.sizes());
  check_contiguous(kOp, "received", received);
  return travel_back(kOp, received, send_map, splits, group_name);
}

at::Tensor combine(const at::Tensor& rows,
                   const at::Tensor& recv_map,
                   const OptionalTensor& recv_weights,
                   const at::Tensor& send_map,
                   const at::Tensor& splits,
                   std::string group_name) {
  constexpr const char* kOp = "combine";
  check_map(kOp, "recv_map", recv_map);
  return travel_back(kOp, sum_rows(rows, recv_map, recv_weights), send_map, splits, group_name);
}

Two combine_backward(const at::Tensor& grad_out,
                     const at::Tensor& recv_map,
                     const at::Tensor& send_map,
                     const at::Tensor& splits,
                     std::string group_name,
                     std::int64_t num_rows,
                     const OptionalTensor& recv_weights,
                     const OptionalTensor& rows) {
  constexpr const char* kOp = "combine_backward";
  check_map(kOp, "recv_map", recv_map);
  check_map(kOp, "send_map", send_map);
  const Wire wire(kOp, group_name);
  Splits shares(kOp, splits, wire.num_ranks());
  const std::int64_t num_sent = shares.num_sent(recv_map.size(0));
  const at::Tensor sent = std::get<0>(scatter_rows(grad_out, send_map, num_sent, {}, {}));
  const at::Tensor received = wire.exchange(sent, shares.sent, shares.received);
  return scatter_rows(received, recv_map, num_rows, recv_weights, rows);
}

using torch::autograd::variable_list;

at::Tensor call_combine(const at::Tensor& rows,
                        const at::Tensor& recv_map,
                        const OptionalTensor& recv_weights,
                        const at::Tensor& send_map,
                        const at::Tensor& splits,
                        const std::string& group_name) {
  using Signature = at::Tensor(const at::Tensor&,
                               const at::Tensor&,
                               const OptionalTensor&,
                               const at::Tensor&,
                               const at::Tensor&,
                               std::string);
  static const auto op = find_op<Signature>("moetuner::combine");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(rows, recv_map, recv_weights, send_map, splits, group_name);
}

class Combine : public torch::autograd::Function<Combine> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context,
                            const at::Tensor& rows,
                            const at::Tensor& recv_map,
                            const OptionalTensor& recv_weights,
                            const at::Tensor& send_map,
                            const at::Tensor& splits,
                            const std::string& group_name) {
    // Rows are kept only where the weights' gradient needs them.
    const bool keeps_rows = recv_weights && recv_weights->requires_grad();
    context->save_for_backward({recv_map,
                                send_map,
                                splits,
                                recv_weights.value_or(at::Tensor()),
                                keeps_rows ? rows : at::Tensor()});
    context->saved_data["group_name"] = group_name;
    context->saved_data["num_rows"] = rows.sym_size(0);
    return call_combine(rows, recv_map, recv_weights, send_map, splits, group_name);
  }

  static variable_list backward(torch::autograd::AutogradContext* context,
                                const variable_list& grads) {
    using Signature = Two(const at::Tensor&,
                          const at::Tensor&,
                          const at::Tensor&,
                          const at::Tensor&,
                          std::string,
                          c10::SymInt,
                          const OptionalTensor&,
                          const OptionalTensor&);
    static const auto op = find_op<Signature>("moetuner::combine_backward");
    const auto saved = context->get_saved_variables();
    const auto [grad_rows, grad_weights] = op.call(grads[0].contiguous(),
                                                   saved[0],
                                                   saved[1],
                                                   saved[2],
                                                   context->saved_data["group_name"].toStringRef(),
                                                   context->saved_data["num_rows"].toSymInt(),
                                                   given(saved[3]),
                                                   given(saved[4]));
    variable_list result(6);
    result[0] = grad_rows;
    if (saved[4].defined()) result[2] = grad_weights;
    return result;
  }
};

at::Tensor combine_autograd(const at::Tensor& rows,
                            const at::Tensor& recv_map,
                            const OptionalTensor& recv_weights,
                            const at::Tensor& send_map,
                            const at::Tensor& splits,
                            std::string group_name) {
  if (!needs_gradient(rows) && !needs_gradient(recv_weights)) {
    return call_combine(rows, recv_map, recv_weights, send_map, splits, group_name);
  }
  return Combine::apply(rows, recv_map, recv_weights, send_map, splits, group_name);
}

void implement(torch::Library& m) {
  m.impl("combine", &combine);
  m.impl("combine_backward", &combine_backward);
  m.impl("send_back", &send_back);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moetuner, m) {
  m.def(
      "combine(Tensor rows, Tensor recv_map, Tensor? recv_weights, Tensor send_map, "
      "Tensor splits, str group_name) -> Tensor");
  m.def(
      "combine_backward(Tensor grad_out, Tensor recv_map, Tensor send_map, Tensor splits, "
      "str group_name, SymInt num_rows, Tensor? recv_weights=None, Tensor? rows=None) "
      "-> (Tensor grad_rows, Tensor grad_recv_weights)");
  m.def("send_back(Tensor received, Tensor send_map, Tensor splits, str group_name) -> Tensor");
}

TORCH_LIBRARY_IMPL(moetuner, CPU, m) { implement(m); }

#ifdef MOETUNER_WITH_CUDA
TORCH_LIBRARY_IMPL(moetuner, CUDA, m) { implement(m); }
#endif

TORCH_LIBRARY_IMPL(moetuner, Autograd, m) {
  m.impl("combine", &combine_autograd);
  m.impl("combine_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("send_back", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace moetuner
