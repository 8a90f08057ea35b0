#include "communicator.h"

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include <algorithm>
#include <numeric>

namespace moetuner {
namespace {

c10::intrusive_ptr<c10d::ProcessGroup> find_group(const char* op, const std::string& name) {
  try {
    return c10d::resolve_process_group(name);
  } catch (const c10::Error&) {
    TORCH_CHECK_VALUE(false,
                      op,
                      ": there is no process group named '",
                      name,
                      "': call torch.distributed.init_process_group first, and pass "
                      "group.group_name of a group that still exists");
  }
}

/// The same memory as rows of bytes, so that every dtype travels.
at::Tensor as_bytes(const at::Tensor& rows) {
  return rows.view({rows.size(0), rows.numel() / std::max<std::int64_t>(rows.size(0), 1)})
      .view(at::kByte);
}

}  // namespace

Communicator::Communicator(const char* op, const std::string& group_name)
    : op_(op), name_(group_name), group_(find_group(op, group_name)) {}

std::int64_t Communicator::timeout_ms() const {
  return group_->getBackend(control_device().type())->getBackendOptions()->timeout.count();
}

at::Device Communicator::control_device() const {
  for (const auto& type : group_->getDeviceTypes()) {
    if (type == at::kCPU) return at::kCPU;
  }
  return at::kCUDA;
}

at::Tensor Communicator::exchange(const at::Tensor& rows,
                                  std::vector<std::int64_t> sent,
                                  std::vector<std::int64_t> received) const {
  const std::int64_t num_received =
      received.empty() ? rows.size(0)
                       : std::accumulate(received.begin(), received.end(), std::int64_t{0});
  std::vector<std::int64_t> sizes = rows.sizes().vec();
  sizes[0] = num_received;
  const at::Tensor out = at::empty(sizes, rows.options());
  exchange_into(out, rows, std::move(sent), std::move(received));
  return out;
}

void Communicator::exchange_into(at::Tensor out,
                                 const at::Tensor& rows,
                                 std::vector<std::int64_t> sent,
                                 std::vector<std::int64_t> received) const {
  if (rows.numel() == 0 && out.numel() == 0 && sent.empty()) return;
  at::Tensor to = as_bytes(out);
  at::Tensor from = as_bytes(rows);
  c10d::AllToAllOptions options;
  options.asyncOp = false;
  const auto all_to_all = [&](auto& group) {
    if constexpr (requires { group.all_to_all_single(to, from, received, sent, options); }) {
      return group.all_to_all_single(to, from, received, sent, options);
    } else {  // its name before torch 2.13
      return group.alltoall_base(to, from, received, sent, options);
    }
  };
  try {
    const auto work = all_to_all(*group_);
    // On CUDA this orders streams and does not wait on the host.
    if (work) work->wait();
  } catch (const c10::DistError& error) {
    fail(error.what_without_backtrace());
  } catch (const c10::Error&) {
    throw;  // what was wrong with the call
  } catch (const std::exception& error) {
    fail(error.what());
  }
}

void Communicator::fail(const std::string& why) const {
  TORCH_CHECK_WITH(DistBackendError,
                   false,
                   op_,
                   ": the exchange of group '",
                   name_,
                   "' did not end on rank ",
                   rank(),
                   " of ",
                   num_ranks(),
                   ", as another rank has ended, stands still or calls other operations: ",
                   why);
}

Splits::Splits(const char* op, const at::Tensor& splits, std::int64_t num_ranks) {
  TORCH_CHECK_TYPE(splits.scalar_type() == at::kLong && splits.device().is_cpu(),
                   op,
                   ": splits must be int64 on the CPU, got ",
                   splits.scalar_type(),
                   " on ",
                   splits.device());
  if (splits.numel() == 0) return;
  TORCH_CHECK_VALUE(splits.dim() == 2 && splits.size(0) == 2 && splits.size(1) == num_ranks,
                    op,
                    ": splits must be [2, ",
                    num_ranks,
                    "] for this group, got ",
                    splits.sizes());
  const at::Tensor list = splits.contiguous();
  const auto* begin = list.const_data_ptr<std::int64_t>();
  sent.assign(begin, begin + num_ranks);
  received.assign(begin + num_ranks, begin + 2 * num_ranks);
}

void Splits::check_received(const char* op, std::int64_t num_rows, std::int64_t num_ranks) const {
  const std::int64_t wanted = std::accumulate(received.begin(), received.end(), std::int64_t{0});
  TORCH_CHECK_VALUE(received.empty() || num_rows == wanted,
                    op,
                    ": splits say that ",
                    wanted,
                    " rows were received, got ",
                    num_rows);
  TORCH_CHECK_VALUE(!received.empty() || num_rows % num_ranks == 0,
                    op,
                    ": ",
                    num_rows,
                    " rows cannot be shared equally by ",
                    num_ranks,
                    " ranks");
}

std::int64_t Splits::num_sent(std::int64_t num_received) const {
  return sent.empty() ? num_received : std::accumulate(sent.begin(), sent.end(), std::int64_t{0});
}

}  // namespace moetuner
