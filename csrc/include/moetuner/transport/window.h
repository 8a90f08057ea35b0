#pragma once

#include "moetuner/transport/peers.h"

#include <array>
#include <cstdint>
#include <vector>

namespace moetuner::transport {

/// The current device among those of all machines, by its UUID.
using DeviceName = std::array<std::int64_t, 2>;
DeviceName name_of_device();

/// Where the ranks of a window stand among others: where rows cross between nodes first, there are
/// such ranks on each node.
struct Standing {
  std::int64_t first_rank = 0;  // of all, which errors name
  int sharing = 0;  // ranks that must find room on this device side by side; 0: those that map
};

/// What a rank tells the others so that they can map its window. Plain bytes.
struct WindowHandle {
  char memory[64];  // cudaIpcMemHandle_t
  DeviceName device;
  char machine[64];  // the boot of its operating system, and NCCL_HOSTID where that is set
  std::int64_t process;
};

/// The window of this rank and those of its peers, mapped. Memory is taken once and given back with
/// the object, which must outlive all that uses it.
class Window {
 public:
  /// Takes memory on the current device. Kernels have `most_blocks` at most; 0: all there are.
  Window(const WindowShape& shape, int rank, std::int64_t timeout_ns, int most_blocks);
  ~Window();
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  WindowHandle handle() const { return handle_; }

  /// Maps the windows of all ranks, in order. Throws where one cannot be mapped.
  void map(const std::vector<WindowHandle>& handles, const Standing& standing);

  const WindowShape& shape() const { return peers_.layout.shape; }
  const Peers& peers() const { return peers_; }
  std::int64_t device_bytes() const;

  /// Who waits for whom, where somebody gave up.
  Abort abort() const;

  /// The next number of an exact dispatch, and a wait for it: its sizes are then in `host()`. False
  /// where somebody gave up, or `timeout_ns` and some seconds have passed.
  std::uint32_t next_ticket();
  bool wait_for_sizes(std::uint32_t ticket) const;
  const HostBox& host() const { return *peers_.host; }

 private:
  void release() noexcept;

  Peers peers_;
  WindowHandle handle_{};
  std::vector<void*> mapped_;
  std::uint32_t ticket_ = 0;
};

}  // namespace moetuner::transport
