#pragma once

#include "moetuner/planning/inlined.h"

// One binary for every x86-64 machine, with a fast path where the machine has it. (target_clones
// cannot name the features alone: its "arch=" asks for one vendor's processor.)

namespace moetuner {

#if defined(__x86_64__) && defined(__GNUC__)
template <typename Loop>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,popcnt"))) void
run_avx512(const Loop& loop) {
  loop();
}

template <typename Loop>
__attribute__((target("avx2,popcnt"))) void run_avx2(const Loop& loop) {
  loop();
}

/// Runs a small hot loop, a lambda marked MOETUNER_INLINE, compiled for this machine's vectors.
template <typename Loop>
void vectorized(const Loop& loop) {
  static const int level = __builtin_cpu_supports("avx512vpopcntdq") &&
                                   __builtin_cpu_supports("avx512vl") &&
                                   __builtin_cpu_supports("avx512bw")
                               ? 2
                               : static_cast<int>(__builtin_cpu_supports("avx2") != 0);
  if (level == 2) return run_avx512(loop);
  if (level == 1) return run_avx2(loop);
  loop();
}
#else
template <typename Loop>
void vectorized(const Loop& loop) {
  loop();
}
#endif

}  // namespace moetuner
