#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <string>
#include <utility>
#include <vector>

namespace moetuner {

/// Keeps, for the backward pass, tensors of the caller's own and what the way back needs.
inline void save_trail(torch::autograd::AutogradContext* context,
                       std::vector<at::Tensor> others,
                       const std::vector<at::Tensor>& send_maps,
                       const std::vector<at::Tensor>& splits,
                       const std::vector<std::string>& groups) {
  others.insert(others.end(), send_maps.begin(), send_maps.end());
  others.insert(others.end(), splits.begin(), splits.end());
  context->save_for_backward(std::move(others));
  context->saved_data["groups"] = groups;
}

/// The same again; `others` are the first `num_others` tensors.
struct SavedTrail {
  std::vector<at::Tensor> others, send_maps, splits;
  std::vector<std::string> groups;

  SavedTrail(torch::autograd::AutogradContext* context, std::ptrdiff_t num_others) {
    const auto saved = context->get_saved_variables();
    groups = context->saved_data["groups"].to<std::vector<std::string>>();
    const auto middle = saved.begin() + num_others;
    const auto num_hops = static_cast<std::ptrdiff_t>(groups.size());
    others.assign(saved.begin(), middle);
    send_maps.assign(middle, middle + num_hops);
    splits.assign(middle + num_hops, saved.end());
  }
};

}  // namespace moetuner
