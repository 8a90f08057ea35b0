#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <string>
#include <vector>

namespace moetuner {

/// torch's own communicator of a process group: NCCL or Gloo, whatever serves the tensors' device.
/// Nothing else is linked, so there is no second NCCL whose version could clash.
class Communicator {
 public:
  /// `op` is named in each error.
  Communicator(const char* op, const std::string& group_name);

  bool is_same(const Communicator& other) const { return group_ == other.group_; }
  std::int64_t rank() const { return group_->getRank(); }
  std::int64_t num_ranks() const { return group_->getSize(); }

  /// Of its collectives.
  std::int64_t timeout_ms() const;
  /// Where small tensors of its own business are carried: the CPU, if any communicator serves that.
  at::Device control_device() const;

  /// Sends sent[g] rows to each rank g, which stand in `rows` one after another, and receives
  /// received[g] rows of it. Empty lists: equal shares. On CUDA it is enqueued on the current
  /// stream.
  at::Tensor exchange(const at::Tensor& rows,
                      std::vector<std::int64_t> sent,
                      std::vector<std::int64_t> received) const;

  /// As `exchange`, into memory that is there already. Where the backend gives up, the error is a
  /// DistBackendError by the name of the op.
  void exchange_into(at::Tensor out,
                     const at::Tensor& rows,
                     std::vector<std::int64_t> sent,
                     std::vector<std::int64_t> received) const;

 private:
  [[noreturn]] void fail(const std::string& why) const;

  const char* op_;
  std::string name_;
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
};

/// What `dispatch` keeps for the way back: rows to and from each rank, on the CPU. Empty in the
/// fixed form, where all shares are equal.
struct Splits {
  std::vector<std::int64_t> sent, received;

  /// From int64 [2, G] or [0].
  Splits(const char* op, const at::Tensor& splits, std::int64_t num_ranks);

  /// Refuses rows that are not those of these shares.
  void check_received(const char* op, std::int64_t num_rows, std::int64_t num_ranks) const;

  /// Rows sent, which are as many as `num_received` where shares are equal.
  std::int64_t num_sent(std::int64_t num_received) const;
};

}  // namespace moetuner
