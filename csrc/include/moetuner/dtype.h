#pragma once

namespace moetuner {

/// Element types that are computed with; sums are always in float32.
enum class Dtype { kFloat32, kBFloat16, kFloat16 };

}  // namespace moetuner
