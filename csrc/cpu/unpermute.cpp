#include "moetuner/ops/unpermute.h"

#include "numeric.h"

#include <algorithm>
#include <vector>

namespace moetuner::cpu {
namespace {

template <typename T, typename W>
struct Unpermute {
  static void forward(const UnpermuteArgs& args) {
    const auto* rows = static_cast<const T*>(args.rows);
    const auto* weights = static_cast<const W*>(args.weights);
    auto* out = static_cast<T*>(args.out);
    std::vector<float> sum(static_cast<std::size_t>(args.hidden));
    for (std::int64_t t = 0; t < args.num_tokens; ++t) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (std::int64_t i = t * args.top_k; i < (t + 1) * args.top_k; ++i) {
        if (args.row_map[i] < 0 || args.row_map[i] >= args.num_rows) continue;
        const T* row = rows + args.row_map[i] * args.hidden;
        const float weight = weights ? float{weights[i]} : 1.0f;
        for (std::int64_t h = 0; h < args.hidden; ++h) sum[h] += weight * float{row[h]};
      }
      std::transform(sum.begin(), sum.end(), out + t * args.hidden, from_float<T>);
    }
  }

  static void backward(const UnpermuteBackwardArgs& args) {
    const auto* grad_out = static_cast<const T*>(args.grad_out);
    const auto* rows = static_cast<const T*>(args.rows);
    const auto* weights = static_cast<const W*>(args.weights);
    auto* grad_rows = static_cast<T*>(args.grad_rows);
    auto* grad_weights = static_cast<W*>(args.grad_weights);
    std::fill_n(grad_rows, args.num_rows * args.hidden, from_float<T>(0.0f));
    for (std::int64_t i = 0; i < args.num_tokens * args.top_k; ++i) {
      if (grad_weights) grad_weights[i] = from_float<W>(0.0f);
      if (args.row_map[i] < 0 || args.row_map[i] >= args.num_rows) continue;
      const T* grad = grad_out + i / args.top_k * args.hidden;
      const std::int64_t first = args.row_map[i] * args.hidden;
      const float weight = weights ? float{weights[i]} : 1.0f;
      float product = 0.0f;
      for (std::int64_t h = 0; h < args.hidden; ++h) {
        grad_rows[first + h] = from_float<T>(weight * float{grad[h]});
        if (grad_weights) product += float{grad[h]} * float{rows[first + h]};
      }
      if (grad_weights) grad_weights[i] = from_float<W>(product);
    }
  }
};

}  // namespace

void unpermute(const UnpermuteArgs& args) {
  with_types<BFloat16, Float16>(args,
                                [&]<typename T, typename W>() { Unpermute<T, W>::forward(args); });
}

void unpermute_backward(const UnpermuteBackwardArgs& args) {
  with_types<BFloat16, Float16>(args,
                                [&]<typename T, typename W>() { Unpermute<T, W>::backward(args); });
}

}  // namespace moetuner::cpu
