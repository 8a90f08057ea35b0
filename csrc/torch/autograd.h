#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

// What the bindings that autograd sees share.

namespace moetuner {

/// The op `name`, whose arguments are those of `Signature`.
template <typename Signature>
auto find_op(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

/// Whether autograd has something to keep. Forward-mode tangents count too: autograd then refuses
/// them, where they would be lost without a word.
inline bool needs_gradient(const std::optional<at::Tensor>& tensor) {
  if (!tensor) return false;
  return (at::GradMode::is_enabled() && tensor->requires_grad()) ||
         tensor->_fw_grad(/*level=*/0).defined();
}

/// A saved tensor as an optional argument: absent where none was saved.
inline std::optional<at::Tensor> given(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

}  // namespace moetuner
