#pragma once

#ifdef MOETUNER_WITH_CUDA
#include <cstdlib>
#include <cstring>

#include <nvtx3/nvToolsExt.h>
#endif

namespace moetuner {

/// An NVTX range while it lives, when MOETUNER_NVTX=1 asks for them; otherwise nothing.
class Range {
 public:
#ifdef MOETUNER_WITH_CUDA
  explicit Range(const char* name) : wanted_(wanted()) {
    if (wanted_) nvtxRangePushA(name);
  }
  ~Range() {
    if (wanted_) nvtxRangePop();
  }

 private:
  static bool wanted() {
    static const bool value = [] {
      const char* asked = std::getenv("MOETUNER_NVTX");
      return asked != nullptr && std::strcmp(asked, "1") == 0;
    }();
    return value;
  }

  bool wanted_;
#else
  explicit Range(const char*) {}
  ~Range() {}  // not trivial: an unused range is no mistake
#endif

 public:
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};

}  // namespace moetuner
