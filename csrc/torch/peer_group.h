#pragma once

#include "communicator.h"
#include "moetuner/transport/window.h"
#include "size_guess.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace moetuner {

/// What may carry rows inside a group of one machine.
enum class Transport : std::int64_t {
  kAuto = 0,         // peer memory where it can be mapped, else a communicator
  kPeers = 1,        // peer memory, or an error that says why not
  kCollectives = 2,  // a communicator
};

/// Settings of a group's transport, the same on all ranks.
struct TransportSettings {
  Transport transport = Transport::kAuto;
  std::int64_t senders = 0;     // blocks that send; 0: as many as suit
  std::int64_t timeout_ms = 0;  // of waits on the device; 0: the group's own
  std::int64_t blocks = 0;      // of a kernel at most; 0: all of the device
};

/// Kept for a group by its name; before the first exchange.
void set_transport(const std::string& group_name, const TransportSettings& settings);

/// What carries rows of the group, in words.
std::string describe_transport(const std::string& group_name);

#ifdef MOETUNER_WITH_CUDA
inline std::int64_t bytes_of_row(const at::Tensor& rows) {
  return rows.size(1) * rows.element_size();
}

/// Of a row in a window: multiples of 16 suit the copy engine.
inline std::int64_t rounded_bytes(std::int64_t bytes) {
  return std::max<std::int64_t>((bytes + 15) / 16 * 16, 16);
}

/// A group whose ranks map each other's memory, or know why they do not. All ranks call the same
/// functions in the same order.
class PeerGroup {
 public:
  PeerGroup(const std::string& group_name, const TransportSettings& settings);

  /// Decides, with all ranks, at the first call; later calls answer alone. The window then holds
  /// `shape`, which must be the same on all ranks but for its rows at the first call.
  bool opens(const char* op, const transport::WindowShape& shape);

  /// Before it opens.
  void stand(const transport::Standing& standing) { standing_ = standing; }

  bool is_of(const Communicator& other) const { return communicator_.is_same(other); }

  /// Whether rows were decided to go this way.
  bool is_open() const { return window_ != nullptr; }

  /// Makes room for rows of `shape`, with all ranks.
  void grow(const char* op, const transport::WindowShape& shape);

  /// Throws where a rank has given up.
  void check(const char* op) const;
  [[noreturn]] void fail(const char* op) const;

  /// Orders this stream behind the one that was used before.
  void follow_stream();

  transport::Window& window() { return *window_; }
  SizeGuess& size_guess() { return size_guess_; }
  int rank() const { return static_cast<int>(communicator_.rank()); }
  std::int64_t num_ranks() const { return communicator_.num_ranks(); }
  const TransportSettings& settings() const { return settings_; }
  std::string describe() const;

 private:
  void open(const char* op, transport::WindowShape shape);
  std::string name_of(std::int64_t rank) const;
  std::string agree(const std::string& trouble) const;

  Communicator communicator_;
  TransportSettings settings_;
  transport::Standing standing_;
  bool decided_ = false;
  std::string refusal_;
  std::unique_ptr<transport::Window> window_;
  std::vector<std::unique_ptr<transport::Window>> captured_;  // that CUDA graphs still use
  bool is_captured_ = false;
  void* stream_ = nullptr;
  SizeGuess size_guess_;
};

/// The group's own, made at the first call.
PeerGroup& peer_group(const std::string& group_name);

/// That of the ranks `inside` a node, where rows cross `between` nodes by another group. All ranks
/// of all nodes make the first call together.
PeerGroup& peer_group_of_node(const char* op,
                              const std::string& inside,
                              const std::string& between);
#endif

}  // namespace moetuner
