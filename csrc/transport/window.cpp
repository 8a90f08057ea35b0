#include "moetuner/transport/window.h"

#include "../cuda/checked_call.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>

#include <unistd.h>

namespace moetuner::transport {
namespace {

constexpr auto kGrace = std::chrono::seconds(5);  // for the device to tell who it waited for

std::size_t control_bytes(const WindowShape& shape) {
  return sizeof(Control) +
         static_cast<std::size_t>(shape.num_ranks * shape.slots_per_rank) * sizeof(std::int32_t);
}

/// The same for all processes of a machine, containers too, and no other one's. Who tells NCCL that
/// processes of one machine are on several (NCCL_HOSTID) tells us too.
std::string name_of_machine() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  std::getline(file, id);
  if (const char* told = std::getenv("NCCL_HOSTID")) {
    id += '/' + std::to_string(std::hash<std::string>{}(told));
  }
  return id;
}

std::uint32_t read_now(const std::uint32_t& word) {
  return std::atomic_ref(const_cast<std::uint32_t&>(word)).load(std::memory_order_acquire);
}

}  // namespace

DeviceName name_of_device() {
  int device = 0;
  cudaDeviceProp properties{};
  MOETUNER_CUDA_CHECK(cudaGetDevice(&device));
  MOETUNER_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  return std::bit_cast<DeviceName>(properties.uuid);
}

Window::Window(const WindowShape& shape, int rank, std::int64_t timeout_ns, int most_blocks)
    : peers_{.windows = {},
             .control = nullptr,
             .host = nullptr,
             .layout = WindowLayout(shape),
             .timeout_ns = timeout_ns,
             .rank = rank,
             .num_ranks = static_cast<int>(shape.num_ranks),
             .sharing = 1,
             .most_blocks = most_blocks} {
  static_assert(sizeof(cudaIpcMemHandle_t) == sizeof(handle_.memory));
  try {
    void* memory = nullptr;
    const WindowLayout& layout = peers_.layout;
    MOETUNER_CUDA_CHECK(cudaMalloc(&memory, static_cast<std::size_t>(layout.bytes)));
    peers_.windows[rank] = static_cast<char*>(memory);
    // Rows need no first value: flags say whether they are there.
    MOETUNER_CUDA_CHECK(cudaMemset(memory, 0, static_cast<std::size_t>(layout.notes)));
    MOETUNER_CUDA_CHECK(cudaMalloc(&memory, control_bytes(shape)));
    peers_.control = static_cast<Control*>(memory);
    MOETUNER_CUDA_CHECK(cudaMemset(memory, 0, control_bytes(shape)));
    MOETUNER_CUDA_CHECK(cudaHostAlloc(&memory, sizeof(HostBox), cudaHostAllocMapped));
    peers_.host = new (memory) HostBox{};
    MOETUNER_CUDA_CHECK(cudaDeviceSynchronize());
    cudaIpcMemHandle_t handle{};
    MOETUNER_CUDA_CHECK(cudaIpcGetMemHandle(&handle, peers_.windows[rank]));
    std::memcpy(handle_.memory, &handle, sizeof(handle));
    handle_.device = name_of_device();
    const std::string name = name_of_machine();
    std::memcpy(handle_.machine, name.data(), std::min(name.size(), sizeof(handle_.machine) - 1));
    handle_.process = getpid();
  } catch (...) {
    release();
    throw;
  }
}

Window::~Window() { release(); }

void Window::release() noexcept {
  // Where the process is ending, CUDA may be gone already: its answers do not matter.
  for (void* memory : mapped_) cudaIpcCloseMemHandle(memory);
  mapped_.clear();
  cudaFree(peers_.windows[peers_.rank]);
  cudaFree(peers_.control);
  cudaFreeHost(peers_.host);
  cudaGetLastError();
}

void Window::map(const std::vector<WindowHandle>& handles, const Standing& standing) {
  int in_group = 0;
  for (int g = 0; g < peers_.num_ranks; ++g) {
    const WindowHandle& other = handles[static_cast<std::size_t>(g)];
    in_group += other.device == handle_.device;
    if (g == peers_.rank) continue;
    const std::string name = "rank " + std::to_string(standing.first_rank + g);
    if (std::memcmp(other.machine, handle_.machine, sizeof(other.machine)) != 0) {
      throw std::runtime_error(name + " is on another machine");
    }
    if (other.process == handle_.process) {
      throw std::runtime_error(name + " is in the same process");
    }
    cudaIpcMemHandle_t handle{};
    std::memcpy(&handle, other.memory, sizeof(handle));
    void* memory = nullptr;
    MOETUNER_CUDA_CHECK(cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess));
    mapped_.push_back(memory);
    peers_.windows[g] = static_cast<char*>(memory);
  }
  peers_.sharing = standing.sharing > 0 ? standing.sharing : in_group;
}

std::int64_t Window::device_bytes() const {
  return peers_.layout.bytes + static_cast<std::int64_t>(control_bytes(shape()));
}

Abort Window::abort() const { return {read_now(peers_.host->abort)}; }

std::uint32_t Window::next_ticket() {
  if (++ticket_ == 0) ++ticket_;  // zero is none
  return ticket_;
}

bool Window::wait_for_sizes(std::uint32_t ticket) const {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::nanoseconds(peers_.timeout_ns) + kGrace;
  while (read_now(peers_.host->ticket) != ticket) {
    if (abort().word != 0 || Clock::now() > end) return false;
  }
  return true;
}

}  // namespace moetuner::transport
