#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MOETUNER_BOTH __host__ __device__
#else
#define MOETUNER_BOTH
#endif

// Ids of experts as ops are given them, int32 or int64. One that int32 does not have is refused on
// every device, and never becomes another expert. On CPUs the binding looks before anything is done
// (`check_ids`). On CUDA nobody may wait for ids, so the kernel that reads one ends by a device
// assertion, as torch's own index operations do. Whatever narrows an id does it by these.

namespace moetuner {

/// `id` as int32 has it; -1 where it does not, and then sets `wide`, for `refuse_wide`.
template <typename Id>
MOETUNER_BOTH std::int32_t narrow_id(Id id, bool& wide) {
  const auto narrow = static_cast<std::int32_t>(id);
  if (narrow == id) return narrow;
  wide = true;
  return -1;
}

/// Ends a kernel that read a wide id; `whose` are the operation and its argument, to be told.
MOETUNER_BOTH inline void refuse_wide([[maybe_unused]] bool wide,
                                      [[maybe_unused]] const char* whose) {
#ifdef __CUDA_ARCH__
  // The value is not told: to print it would cost kernels that are full their registers.
  if (wide) __assert_fail("ids are within int32, and -1 is padding", __FILE__, __LINE__, whose);
#endif
}

/// Both at once.
template <typename Id>
MOETUNER_BOTH std::int32_t read_id(const Id* ids, std::int64_t at, const char* whose) {
  bool wide = false;
  const std::int32_t id = narrow_id(ids[at], wide);
  refuse_wide(wide, whose);
  return id;
}

}  // namespace moetuner
