#pragma once

// Sums of columns that lie in shared memory: a warp adds up some *units* of 512 bytes side by side,
// 16 bytes a lane of each. What a multiprocessor adds is bound by the instructions that it takes,
// so these loops have little but loads, conversions and additions.

#include "launch.cuh"
#include "numeric.cuh"
#include "sum_lines.cuh"

#include <cuda_runtime.h>

#include <cstdint>

namespace moetuner::transport {

using namespace moetuner::cuda;

/// This lane's columns of some units.
template <typename T, int kUnits>
struct Units {
  static constexpr int kStep = kWarp * 16;

  Columns<T, kWide<T>> of[kUnits];

  /// Unit `u` from shared memory; ordered after whatever waited for it.
  __device__ void load(std::uint32_t from, int u) {
    uint4& word = of[u].word;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                 : "r"(from + u * kStep));
  }
  __device__ void load(std::uint32_t from) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) load(from, u);
  }

  __device__ void store(char* to) const {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const uint4& word = of[u].word;
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(
                       __cvta_generic_to_global(to + u * kStep)),
                   "r"(word.x),
                   "r"(word.y),
                   "r"(word.z),
                   "r"(word.w)
                   : "memory");
    }
  }
};

/// Sums in float32, rounded at the end.
template <typename T, int kUnits>
struct UnitSums {
  float of[kUnits][kWide<T>] = {};

  __device__ void add(const Units<T, kUnits>& units, int u, float weight) {
#pragma unroll
    for (int w = 0; w < kWide<T>; ++w) of[u][w] += weight * units.of[u][w];
  }
  __device__ void add(const Units<T, kUnits>& units) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int w = 0; w < kWide<T>; ++w) of[u][w] += units.of[u][w];
    }
  }
  __device__ Units<T, kUnits> rounded_units() const {
    Units<T, kUnits> out;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) out.of[u] = rounded<T>(of[u]);
    return out;
  }
};

__device__ inline float load_weight(std::uint32_t from) {
  float weight;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(weight) : "r"(from));
  return weight;
}

/// The weighed sum of rows, `step` bytes from one to the next, in their order. A unit of the next
/// row is loaded as soon as that of this one is added, into the same registers.
template <typename T, int kUnits>
__device__ Units<T, kUnits> sum_rows(std::uint32_t from,
                                     int step,
                                     int rows,
                                     std::uint32_t weights) {
  UnitSums<T, kUnits> sums;
  if (rows > 0) {
    Units<T, kUnits> units;
    float weight = load_weight(weights);
    units.load(from);
    const auto add_and_load_next = [&] {
      weights += 4;
      from += step;
      const float next_weight = load_weight(weights);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        sums.add(units, u, weight);
        units.load(from, u);
      }
      weight = next_weight;
    };
    if (rows > 1) add_and_load_next();  // its sums begin as products: no zeros are written
    for (int left = rows - 2; left > 0; --left) add_and_load_next();
#pragma unroll
    for (int u = 0; u < kUnits; ++u) sums.add(units, u, weight);
  }
  return sums.rounded_units();
}

/// The sum of what the visits have left, in their order, `stored` being the first of them that is
/// not `here`: that was made of the rows here. No visits: the rows here alone.
template <typename T, int kUnits>
__device__ Units<T, kUnits> sum_visits(unsigned int visits,
                                       unsigned int here_visit,
                                       std::uint32_t stored,
                                       int step,
                                       const Units<T, kUnits>& here) {
  if (visits == 0) return here;
  UnitSums<T, kUnits> sums;
  for (unsigned int left = visits; left != 0; left &= left - 1) {
    if ((left & -left) == here_visit) {
      sums.add(here);
    } else {
      Units<T, kUnits> other;
      other.load(stored);
      stored += step;
      sums.add(other);
    }
  }
  return sums.rounded_units();
}

}  // namespace moetuner::transport
