#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace moetuner::cuda {

/// Throws with the call's text, its place and CUDA's own words; clears the sticky error.
inline void checked_call(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(call) + " failed at " + file + ":" + std::to_string(line) +
                           ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

}  // namespace moetuner::cuda

/// Every CUDA call goes through this; after a launch: MOETUNER_CUDA_CHECK(cudaGetLastError()).
#define MOETUNER_CUDA_CHECK(call) ::moetuner::cuda::checked_call((call), #call, __FILE__, __LINE__)
