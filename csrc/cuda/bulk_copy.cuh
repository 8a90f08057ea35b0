#pragma once

// The few instructions of Hopper's bulk copy engine that we use: global -> shared, announced to a
// barrier in shared memory, and shared -> global. Sizes and addresses are multiples of 16 bytes.
// On older architectures they are never called.

#include <cuda_runtime.h>

#include <cstdint>

namespace moetuner::cuda::bulk {

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

/// In shared memory: a pointer, or what a loop has made of one. The compiler makes addresses from
/// pointers anew wherever they are used, which takes longer than to add up what is there.
struct Shared {
  std::uint32_t address;

  __device__ Shared(const void* pointer) : address(shared_address(pointer)) {}
  __device__ explicit Shared(std::uint32_t known) : address(known) {}
};

/// The address of `pointer`, kept in a register.
__device__ inline std::uint32_t kept_address(const void* pointer) {
  std::uint32_t kept;
  asm volatile("mov.u32 %0, %1;" : "=r"(kept) : "r"(shared_address(pointer)));
  return kept;
}

/// A barrier for loads of the calling thread, visible to the copy engine.
__device__ inline void init(Shared barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier.address) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

/// Says that the barrier's phase completes when `bytes` have been loaded.
__device__ inline void expect(Shared barrier, std::int64_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier.address),
               "r"(static_cast<std::uint32_t>(bytes))
               : "memory");
#endif
}

/// Loads what nobody reads again soon.
__device__ inline void load(Shared to, const void* from, int bytes, Shared barrier) {
#if __CUDA_ARCH__ >= 900
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to.address),
      "l"(__cvta_generic_to_global(from)),
      "r"(bytes),
      "r"(barrier.address),
      "l"(policy)
      : "memory");
#endif
}

/// Waits until the phase of `parity` (0, 1, 0, ...) is complete.
__device__ inline void wait(Shared barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  std::uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(barrier.address), "r"(parity)
        : "memory");
  }
#endif
}

__device__ inline void store(void* to, Shared from, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(from.address),
               "r"(bytes)
               : "memory");
#endif
}

/// Closes the group of stores that this thread has begun since the last one.
__device__ inline void commit() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

/// Waits until all but the last `kLeft` groups of this thread have read their shared memory.
template <int kLeft>
__device__ inline void wait_read() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
#endif
}

/// Waits until all but the last `kLeft` groups of this thread are written.
template <int kLeft>
__device__ inline void wait_written() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

/// Waits until all stores of this thread have read their shared memory.
__device__ inline void wait_stores_read() {
  commit();
  wait_read<0>();
}

}  // namespace moetuner::cuda::bulk
