#pragma once

namespace moetuner {

/// Element types that are computed with; sums are always in float32.
enum class Dtype { kFloat32, kBFloat16, kFloat16 };

/// Calls `run<T, W>()` for the element types of `args`, rows of T and weights of W, where 16-bit
/// ones are those of the caller.
template <typename BFloat16, typename Float16, typename Args, typename Run>
void with_types(const Args& args, const Run& run) {
  const bool wide_weights = args.weight_dtype == Dtype::kFloat32;
  switch (args.dtype) {
    case Dtype::kFloat32:
      return run.template operator()<float, float>();
    case Dtype::kBFloat16:
      return wide_weights ? run.template operator()<BFloat16, float>()
                          : run.template operator()<BFloat16, BFloat16>();
    case Dtype::kFloat16:
      return wide_weights ? run.template operator()<Float16, float>()
                          : run.template operator()<Float16, Float16>();
  }
}

}  // namespace moetuner
