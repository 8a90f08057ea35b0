#pragma once

#include "moetuner/planning/wire.h"

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string_view>

namespace moetuner {

/// Which replica of an expert a token goes to. Python's `moetuner.ReplicaRule`, which has sources.
enum class ReplicaRule {
  kMoetuner,       // of those on its rank, else on its node, else of all, by its index
  kVllm,           // of all, by a hash of its row
  kSglangStatic,   // the one that its rank has for the expert: own, else of its node, else any
  kSglangDynamic,  // of all, at random
  kVllmAscend,     // of all, by its rank
  kTensorrtLlm,    // of all, in turn
};

/// Whether the rank that a token comes from decides.
constexpr bool asks_home(ReplicaRule rule) {
  switch (rule) {
    case ReplicaRule::kMoetuner:
    case ReplicaRule::kSglangStatic:
    case ReplicaRule::kVllmAscend:
    case ReplicaRule::kTensorrtLlm:
      return true;
    case ReplicaRule::kVllm:
    case ReplicaRule::kSglangDynamic:
      return false;
  }
  throw std::invalid_argument("asks_home: no such rule");
}

/// Whether a token's row in the batch of its rank decides.
constexpr bool asks_row(ReplicaRule rule) {
  switch (rule) {
    case ReplicaRule::kVllm:
    case ReplicaRule::kTensorrtLlm:
      return true;
    case ReplicaRule::kMoetuner:
    case ReplicaRule::kSglangStatic:
    case ReplicaRule::kSglangDynamic:
    case ReplicaRule::kVllmAscend:
      return false;
  }
  throw std::invalid_argument("asks_row: no such rule");
}

constexpr std::string_view name_of(ReplicaRule rule) {
  switch (rule) {
    case ReplicaRule::kMoetuner:
      return "moetuner";
    case ReplicaRule::kVllm:
      return "vllm";
    case ReplicaRule::kSglangStatic:
      return "sglang-static";
    case ReplicaRule::kSglangDynamic:
      return "sglang-dynamic";
    case ReplicaRule::kVllmAscend:
      return "vllm-ascend";
    case ReplicaRule::kTensorrtLlm:
      return "tensorrt-llm";
  }
  throw std::invalid_argument("name_of: no such replica rule");
}

template <>
inline constexpr std::array kAll<ReplicaRule>{ReplicaRule::kMoetuner,
                                              ReplicaRule::kVllm,
                                              ReplicaRule::kSglangStatic,
                                              ReplicaRule::kSglangDynamic,
                                              ReplicaRule::kVllmAscend,
                                              ReplicaRule::kTensorrtLlm};

}  // namespace moetuner
