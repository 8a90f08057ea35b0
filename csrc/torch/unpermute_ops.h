#pragma once

#include "autograd.h"

#include <tuple>

// `unpermute` and its gradients, for other ops that are made of them.

namespace moetuner {

/// Sum of the rows of each line of `row_map`, times `weights` where there are any.
inline at::Tensor sum_rows(const at::Tensor& rows,
                           const at::Tensor& row_map,
                           const std::optional<at::Tensor>& weights) {
  using Signature = at::Tensor(const at::Tensor&,
                               const at::Tensor&,
                               const std::optional<at::Tensor>&,
                               std::optional<std::int64_t>);
  static const auto op = find_op<Signature>("moetuner::unpermute");
  return op.call(rows, row_map, weights, {});
}

/// Gradients of `sum_rows` in `num_rows` rows and in the weights, which needs `rows`.
inline std::tuple<at::Tensor, at::Tensor> scatter_rows(const at::Tensor& grad,
                                                       const at::Tensor& row_map,
                                                       std::int64_t num_rows,
                                                       const std::optional<at::Tensor>& weights,
                                                       const std::optional<at::Tensor>& rows) {
  using Signature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&,
                                                       const at::Tensor&,
                                                       std::int64_t,
                                                       const std::optional<at::Tensor>&,
                                                       const std::optional<at::Tensor>&);
  static const auto op = find_op<Signature>("moetuner::unpermute_backward");
  return op.call(grad, row_map, num_rows, weights, rows);
}

}  // namespace moetuner
