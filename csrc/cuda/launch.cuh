#pragma once

// Launches that may begin before the kernel ahead of them has ended (programmatic dependent launch,
// Hopper and newer). Every kernel launched so calls `wait_for_predecessor` before it touches what
// others have written; before that it may only set up its own shared memory, or read what was
// complete before its predecessor was let go.

#include "checked_call.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace moetuner::cuda {

constexpr int kWarp = 32;
constexpr unsigned int kAllLanes = 0xffffffff;

__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }

/// Some warps of a block: this one is the `index`-th of `count`, or none of them when negative.
struct Warps {
  int index, count;
};

__device__ inline Warps warps_from(int first) {
  return {warp_index() - first, static_cast<int>(blockDim.x) / kWarp - first};
}

/// Returns when the kernels ahead are complete and their writes visible.
__device__ inline void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

/// Lets the next kernel begin as soon as every block has come here and there is room.
__device__ inline void let_successor_begin() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/// Whether all pointers and sizes are multiples of `bytes`, a power of two.
template <typename... Values>
bool is_multiple(int bytes, Values... values) {
  return ((std::uintptr_t)values | ...) % bytes == 0;
}

/// What launches ask of a device.
struct Device {
  bool is_hopper;  // or newer, and runs code made for it: bulk copies, overlapping launches
  std::int64_t processors;
  std::int64_t shared_bytes;  // of a block, when asked for

  /// The current one.
  static const Device& current() {
    static const std::vector<Device> all = query_all();
    int index = 0;
    MOETUNER_CUDA_CHECK(cudaGetDevice(&index));
    return all[static_cast<std::size_t>(index)];
  }

 private:
  /// Whether a device of `capability`, as __CUDA_ARCH__ says it, runs code compiled for Hopper or
  /// newer. A build for Ampere alone runs there too, translated, and knows nothing of either.
  static bool has_hopper_code(int capability) {
    for (const int compiled : {__CUDA_ARCH_LIST__}) {
      if (compiled >= 900 && compiled <= capability) return true;
    }
    return false;
  }

  static std::vector<Device> query_all() {
    int count = 0;
    MOETUNER_CUDA_CHECK(cudaGetDeviceCount(&count));
    std::vector<Device> all;
    for (int index = 0; index < count; ++index) {
      const auto ask = [&](cudaDeviceAttr attribute) {
        int value = 0;
        MOETUNER_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, index));
        return value;
      };
      all.push_back({has_hopper_code(100 * ask(cudaDevAttrComputeCapabilityMajor) +
                                     10 * ask(cudaDevAttrComputeCapabilityMinor)),
                     ask(cudaDevAttrMultiProcessorCount),
                     ask(cudaDevAttrMaxSharedMemoryPerBlockOptin)});
    }
    return all;
  }
};

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Size of a launch.
struct Grid {
  std::int64_t blocks;
  int threads;
  std::int64_t shared_bytes = 0;
};

/// Lets `kernel` have so much shared memory. What was said of it on this device is remembered, as
/// the driver takes longer to hear it again than to be told of a launch.
template <typename... Args>
void allow_shared_bytes(void (*kernel)(Args...), std::int64_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<void (*)(Args...), int>, std::int64_t> allowed;
  int device = 0;
  MOETUNER_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  std::int64_t& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  MOETUNER_CUDA_CHECK(cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  most = bytes;
}

/// Enqueues `kernel`, overlapped with the end of its predecessor where the device can.
template <typename Kernel, typename... Args>
void launch(Kernel kernel, const Grid& grid, cudaStream_t stream, const Args&... args) {
  if (grid.blocks > std::numeric_limits<std::int32_t>::max()) {
    throw std::length_error("moetuner: too many tokens for one launch, which would need " +
                            std::to_string(grid.blocks) + " blocks: split them");
  }
  constexpr std::int64_t kAlwaysThere = 40 * 1024;  // static shared memory comes on top
  if (grid.shared_bytes > kAlwaysThere) allow_shared_bytes(kernel, grid.shared_bytes);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned int>(grid.blocks);
  config.blockDim = static_cast<unsigned int>(grid.threads);
  config.dynamicSmemBytes = static_cast<std::size_t>(grid.shared_bytes);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = Device::current().is_hopper ? 1 : 0;
  MOETUNER_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace moetuner::cuda
