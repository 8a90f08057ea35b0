#include "moetuner/ops/unpermute.h"

#include "autograd.h"
#include "routing_args.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#ifdef MOETUNER_WITH_CUDA
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace moetuner {
namespace {

constexpr const char* kOp = "unpermute";
constexpr const char* kBackwardOp = "unpermute_backward";
using Two = std::tuple<at::Tensor, at::Tensor>;

Dtype dtype_of(const char* op, const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK_TYPE(false,
                       op,
                       ": ",
                       name,
                       " must be float32, bfloat16 or float16, got ",
                       tensor.scalar_type());
  }
}

/// `rows` [rows, hidden] named `name`, with a map and weights [tokens, top_k] that fit.
void check(const char* op,
           const char* name,
           const at::Tensor& rows,
           const at::Tensor& row_map,
           const OptionalTensor& weights) {
  TORCH_CHECK_VALUE(rows.dim() == 2, op, ": ", name, " must be 2-D, got ", rows.sizes());
  check_contiguous(op, name, rows);
  TORCH_CHECK_VALUE(
      row_map.dim() == 2, op, ": row_map must be [tokens, top_k], got ", row_map.sizes());
  TORCH_CHECK_TYPE(row_map.scalar_type() == at::kInt,
                   op,
                   ": row_map must be int32, got ",
                   row_map.scalar_type());
  check_contiguous(op, "row_map", row_map);
  check_device(op, "row_map", row_map, name, rows);
  if (!weights) return;
  TORCH_CHECK_VALUE(weights->sizes() == row_map.sizes(),
                    op,
                    ": weights must be ",
                    row_map.sizes(),
                    " like row_map, got ",
                    weights->sizes());
  TORCH_CHECK_TYPE(
      weights->scalar_type() == at::kFloat || weights->scalar_type() == rows.scalar_type(),
      op,
      ": weights must be float32 or ",
      rows.scalar_type(),
      " like ",
      name,
      ", got ",
      weights->scalar_type());
  check_contiguous(op, "weights", *weights);
  check_device(op, "weights", *weights, name, rows);
}

UnpermuteArgs prepare(const at::Tensor& rows,
                      const at::Tensor& row_map,
                      const OptionalTensor& weights,
                      std::optional<std::int64_t> num_tokens,
                      at::Tensor& out) {
  const Dtype dtype = dtype_of(kOp, "rows", rows);
  check(kOp, "rows", rows, row_map, weights);
  TORCH_CHECK_VALUE(num_tokens.value_or(row_map.size(0)) == row_map.size(0),
                    kOp,
                    ": num_tokens is ",
                    num_tokens.value_or(0),
                    ", row_map has ",
                    row_map.size(0),
                    " tokens");
  out = at::empty({row_map.size(0), rows.size(1)}, rows.options());
  return {
      .rows = rows.const_data_ptr(),
      .row_map = row_map.const_data_ptr<std::int32_t>(),
      .weights = weights ? weights->const_data_ptr() : nullptr,
      .out = out.mutable_data_ptr(),
      .dtype = dtype,
      .weight_dtype = weights ? dtype_of(kOp, "weights", *weights) : Dtype::kFloat32,
      .num_tokens = row_map.size(0),
      .top_k = row_map.size(1),
      .num_rows = rows.size(0),
      .hidden = rows.size(1),
  };
}

at::Tensor unpermute_cpu(const at::Tensor& rows,
                         const at::Tensor& row_map,
                         const OptionalTensor& weights,
                         std::optional<std::int64_t> num_tokens) {
  at::Tensor out;
  cpu::unpermute(prepare(rows, row_map, weights, num_tokens, out));
  return out;
}

/// Gradients that the kernels fill; `grad_weights` is empty where rows are not given.
UnpermuteBackwardArgs prepare_backward(const at::Tensor& grad_out,
                                       const at::Tensor& row_map,
                                       std::int64_t num_rows,
                                       const OptionalTensor& weights,
                                       const OptionalTensor& rows,
                                       Two& grads) {
  const Dtype dtype = dtype_of(kBackwardOp, "grad_out", grad_out);
  check(kBackwardOp, "grad_out", grad_out, row_map, weights);
  TORCH_CHECK_VALUE(grad_out.size(0) == row_map.size(0),
                    kBackwardOp,
                    ": grad_out must have ",
                    row_map.size(0),
                    " tokens like row_map, got ",
                    grad_out.size(0));
  TORCH_CHECK_VALUE(!rows || weights, kBackwardOp, ": rows are read for the weights, got none");
  if (rows) {
    const std::vector<std::int64_t> wanted{num_rows, grad_out.size(1)};
    TORCH_CHECK_VALUE(rows->sizes().equals(wanted),
                      kBackwardOp,
                      ": rows must be ",
                      wanted,
                      ", got ",
                      rows->sizes());
    TORCH_CHECK_TYPE(rows->scalar_type() == grad_out.scalar_type(),
                     kBackwardOp,
                     ": rows must be ",
                     grad_out.scalar_type(),
                     " like grad_out, got ",
                     rows->scalar_type());
    check_contiguous(kBackwardOp, "rows", *rows);
    check_device(kBackwardOp, "rows", *rows, "grad_out", grad_out);
  }
  auto& [grad_rows, grad_weights] = grads;
  grad_rows = at::empty({num_rows, grad_out.size(1)}, grad_out.options());
  grad_weights = rows ? at::empty_like(*weights) : at::empty({0}, grad_out.options());
  return {
      .grad_out = grad_out.const_data_ptr(),
      .rows = rows ? rows->const_data_ptr() : nullptr,
      .row_map = row_map.const_data_ptr<std::int32_t>(),
      .weights = weights ? weights->const_data_ptr() : nullptr,
      .grad_rows = grad_rows.mutable_data_ptr(),
      .grad_weights = rows ? grad_weights.mutable_data_ptr() : nullptr,
      .owned = nullptr,
      .dtype = dtype,
      .weight_dtype = weights ? dtype_of(kBackwardOp, "weights", *weights) : Dtype::kFloat32,
      .num_tokens = row_map.size(0),
      .top_k = row_map.size(1),
      .num_rows = num_rows,
      .hidden = grad_out.size(1),
  };
}

Two unpermute_backward_cpu(const at::Tensor& grad_out,
                           const at::Tensor& row_map,
                           std::int64_t num_rows,
                           const OptionalTensor& weights,
                           const OptionalTensor& rows) {
  Two grads;
  cpu::unpermute_backward(prepare_backward(grad_out, row_map, num_rows, weights, rows, grads));
  return grads;
}

#ifdef MOETUNER_WITH_CUDA
at::Tensor unpermute_cuda(const at::Tensor& rows,
                          const at::Tensor& row_map,
                          const OptionalTensor& weights,
                          std::optional<std::int64_t> num_tokens) {
  const c10::DeviceGuard guard(rows.device());
  at::Tensor out;
  const auto args = prepare(rows, row_map, weights, num_tokens, out);
  cuda::unpermute(args, c10::cuda::getCurrentCUDAStream());
  return out;
}

Two unpermute_backward_cuda(const at::Tensor& grad_out,
                            const at::Tensor& row_map,
                            std::int64_t num_rows,
                            const OptionalTensor& weights,
                            const OptionalTensor& rows) {
  const c10::DeviceGuard guard(grad_out.device());
  Two grads;
  auto args = prepare_backward(grad_out, row_map, num_rows, weights, rows, grads);
  if (row_map.numel() == 0 || args.hidden == 0) {  // nothing to launch
    std::get<0>(grads).zero_();
    std::get<1>(grads).zero_();
    return grads;
  }
  const at::Tensor owned = at::empty({num_rows}, grad_out.options().dtype(at::kByte));
  args.owned = owned.mutable_data_ptr<std::uint8_t>();
  cuda::unpermute_backward(args, c10::cuda::getCurrentCUDAStream());
  return grads;
}
#endif

using torch::autograd::variable_list;

/// Below autograd.
at::Tensor call_unpermute(const at::Tensor& rows,
                          const at::Tensor& row_map,
                          const OptionalTensor& weights,
                          const std::optional<c10::SymInt>& num_tokens) {
  using Signature = at::Tensor(
      const at::Tensor&, const at::Tensor&, const OptionalTensor&, std::optional<c10::SymInt>);
  static const auto op = find_op<Signature>("moetuner::unpermute");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(rows, row_map, weights, num_tokens);
}

class Unpermute : public torch::autograd::Function<Unpermute> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context,
                            const at::Tensor& rows,
                            const at::Tensor& row_map,
                            const OptionalTensor& weights,
                            const std::optional<c10::SymInt>& num_tokens) {
    // Rows are kept only where the weights' gradient needs them.
    const bool keeps_rows = weights && weights->requires_grad();
    context->save_for_backward(
        {row_map, weights.value_or(at::Tensor()), keeps_rows ? rows : at::Tensor()});
    context->saved_data["num_rows"] = rows.sym_size(0);
    return call_unpermute(rows, row_map, weights, num_tokens);
  }

  static variable_list backward(torch::autograd::AutogradContext* context,
                                const variable_list& grads) {
    using Signature = Two(const at::Tensor&,
                          const at::Tensor&,
                          c10::SymInt,
                          const OptionalTensor&,
                          const OptionalTensor&);
    static const auto op = find_op<Signature>("moetuner::unpermute_backward");
    const auto saved = context->get_saved_variables();
    variable_list result(4);
    if (!grads[0].defined()) return result;
    const auto [grad_rows, grad_weights] = op.call(grads[0].contiguous(),
                                                   saved[0],
                                                   context->saved_data["num_rows"].toSymInt(),
                                                   given(saved[1]),
                                                   given(saved[2]));
    result[0] = grad_rows;
    if (saved[2].defined()) result[2] = grad_weights;
    return result;
  }
};

at::Tensor unpermute_autograd(const at::Tensor& rows,
                              const at::Tensor& row_map,
                              const OptionalTensor& weights,
                              std::optional<c10::SymInt> num_tokens) {
  if (!needs_gradient(rows) && !needs_gradient(weights)) {
    return call_unpermute(rows, row_map, weights, num_tokens);
  }
  return Unpermute::apply(rows, row_map, weights, num_tokens);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moetuner, m) {
  m.def(
      "unpermute(Tensor rows, Tensor row_map, Tensor? weights=None, SymInt? num_tokens=None) "
      "-> Tensor");
  m.def(
      "unpermute_backward(Tensor grad_out, Tensor row_map, SymInt num_rows, Tensor? weights=None, "
      "Tensor? rows=None) -> (Tensor grad_rows, Tensor grad_weights)");
}

TORCH_LIBRARY_IMPL(moetuner, CPU, m) {
  m.impl("unpermute", &unpermute_cpu);
  m.impl("unpermute_backward", &unpermute_backward_cpu);
}

#ifdef MOETUNER_WITH_CUDA
TORCH_LIBRARY_IMPL(moetuner, CUDA, m) {
  m.impl("unpermute", &unpermute_cuda);
  m.impl("unpermute_backward", &unpermute_backward_cuda);
}
#endif

TORCH_LIBRARY_IMPL(moetuner, Autograd, m) {
  m.impl("unpermute", &unpermute_autograd);
  m.impl("unpermute_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace moetuner
