#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace moetuner::cuda {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ T from_float(float value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return value;
  }
}

/// The next value of float32, or the next two of 16 bits: one instruction rounds both.
template <typename T>
__device__ std::uint32_t word_from(const float* values) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(values[0], values[1]);
    return *reinterpret_cast<const std::uint32_t*>(&two);
  } else if constexpr (std::is_same_v<T, __half>) {
    const __half2 two = __floats2half2_rn(values[0], values[1]);
    return *reinterpret_cast<const std::uint32_t*>(&two);
  } else {
    return __float_as_uint(values[0]);
  }
}

/// What one thread reads and writes at a time.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

/// Reads what is complete and nobody reads again soon; 16 bytes past the L1 cache.
template <typename Values, typename T>
__device__ Values load_once(const T* from) {
  Values values;
  if constexpr (sizeof(Values) == 16) {
    uint4 word;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                 : "l"(from));
    *reinterpret_cast<uint4*>(&values) = word;
  } else {
    values = *reinterpret_cast<const Values*>(from);
  }
  return values;
}

/// Writes what nobody reads soon, all columns by one instruction, which a plain assignment is not
/// trusted to do; first out of the cache, so that it pushes no rows out that are still to be read.
template <typename T, typename Values>
__device__ void store_once(T* to, const Values& values) {
  if constexpr (sizeof(Values) == 16) {
    __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&values));
  } else {
    *reinterpret_cast<Values*>(to) = values;
  }
}

/// Elements in 16 bytes.
template <typename T>
constexpr int kWide = 16 / sizeof(T);

}  // namespace moetuner::cuda
