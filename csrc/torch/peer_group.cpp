#include "peer_group.h"

#include <map>
#include <mutex>
#include <optional>
#include <utility>

#ifdef MOETUNER_WITH_CUDA
#include "../cuda/checked_call.h"

#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstring>
#endif

namespace moetuner {
namespace {

/// What was said about groups, by name. Never destroyed: at the end of a process CUDA may be gone
/// before us, and peers may still write here.
struct Registry {
  std::mutex mutex;
  std::map<std::string, TransportSettings> settings;
#ifdef MOETUNER_WITH_CUDA
  std::map<std::string, std::unique_ptr<PeerGroup>> groups;
  std::map<std::string, std::pair<Communicator, transport::Standing>>
      standings;  // by the name inside a node
#endif
};

Registry& registry() {
  static auto* const all = new Registry;
  return *all;
}

}  // namespace

void set_transport(const std::string& group_name, const TransportSettings& settings) {
  const std::lock_guard lock(registry().mutex);
#ifdef MOETUNER_WITH_CUDA
  registry().groups.erase(group_name);
#endif
  registry().settings[group_name] = settings;
}

#ifndef MOETUNER_WITH_CUDA

std::string describe_transport(const std::string&) { return "the group's communicator"; }

#else

namespace {

constexpr std::int64_t kRowsAtOnce = 128;  // windows grow in steps, so that they grow seldom
constexpr std::int64_t kMostRows = std::int64_t{1} << 30;  // kernels number those that come by int

std::int64_t round_up(std::int64_t value, std::int64_t step) {
  return (value + step - 1) / step * step;
}

/// The window that holds both.
transport::WindowShape larger(const transport::WindowShape& a, const transport::WindowShape& b) {
  return {.num_ranks = a.num_ranks,
          .num_rows = std::max(a.num_rows, b.num_rows),
          .row_bytes = std::max(a.row_bytes, b.row_bytes),
          .top_k = std::max(a.top_k, b.top_k),
          .slots_per_rank = std::max(a.slots_per_rank, b.slots_per_rank)};
}

const char* what_of(transport::Wait what) {
  switch (what) {
    case transport::Wait::kCounts:
      return "the counts of a dispatch";
    case transport::Wait::kRows:
      return "rows";
    case transport::Wait::kSums:
      return "sums of a combine";
    case transport::Wait::kBlocks:
      return "its own blocks";
    case transport::Wait::kEnd:
      return "the begin of an operation";
  }
  return "something";
}

/// The answers of all ranks, in their order.
std::vector<std::vector<std::int64_t>> tell_all(const Communicator& group,
                                                const std::vector<std::int64_t>& mine) {
  const auto size = static_cast<std::int64_t>(mine.size());
  const at::Tensor row = at::tensor(mine, at::TensorOptions().dtype(at::kLong));
  const at::Tensor sent = row.expand({group.num_ranks(), size}).contiguous();
  const at::Tensor all = group.exchange(sent.to(group.control_device()), {}, {}).cpu();
  std::vector<std::vector<std::int64_t>> out;
  for (std::int64_t g = 0; g < group.num_ranks(); ++g) {
    const auto* begin = all[g].const_data_ptr<std::int64_t>();
    out.emplace_back(begin, begin + size);
  }
  return out;
}

void refuse_capture(const char* op) {
  TORCH_CHECK_VALUE(
      c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None,
      op,
      ": memory of the ranks is mapped at the first call, which a CUDA graph cannot capture: call "
      "it once with the same sizes before");
}

/// Where ranks share a device, one may be in the hop between nodes, whose kernels need processors
/// to themselves, while all others wait for it: they are counted twice, so that those who wait
/// leave enough of them free.
transport::Standing find_standing(const char* op,
                                  const Communicator& inside,
                                  const Communicator& between) {
  refuse_capture(op);
  const auto mine = transport::name_of_device();
  std::vector<std::int64_t> of_place;  // the devices of this place in all nodes
  for (const auto& device : tell_all(between, {mine.begin(), mine.end()})) {
    of_place.insert(of_place.end(), device.begin(), device.end());
  }
  int sharing = 0;
  for (const auto& devices : tell_all(inside, of_place)) {
    for (auto at = devices.begin(); at != devices.end(); at += mine.size()) {
      sharing += std::equal(mine.begin(), mine.end(), at);
    }
  }
  return {.first_rank = between.rank() * inside.num_ranks(),
          .sharing = sharing > 1 ? 2 * sharing : 1};
}

}  // namespace

PeerGroup& peer_group(const std::string& group_name) {
  const std::lock_guard lock(registry().mutex);
  auto& group = registry().groups[group_name];
  // A group that was destroyed and made again has the same name and other communicators.
  if (group && !group->is_of(Communicator("dispatch", group_name))) group.reset();
  if (!group) group = std::make_unique<PeerGroup>(group_name, registry().settings[group_name]);
  return *group;
}

PeerGroup& peer_group_of_node(const char* op,
                              const std::string& inside,
                              const std::string& between) {
  PeerGroup& group = peer_group(inside);
  const auto known = [&]() -> std::optional<transport::Standing> {
    const std::lock_guard lock(registry().mutex);
    const auto found = registry().standings.find(inside);
    if (found == registry().standings.end() || !group.is_of(found->second.first)) return {};
    return found->second.second;
  };
  std::optional<transport::Standing> standing = known();
  if (!standing) {
    const Communicator of_node(op, inside);
    standing = find_standing(op, of_node, Communicator(op, between));
    const std::lock_guard lock(registry().mutex);
    registry().standings.insert_or_assign(inside, std::pair(of_node, *standing));
  }
  group.stand(*standing);
  return group;
}

std::string describe_transport(const std::string& group_name) {
  return peer_group(group_name).describe();
}

PeerGroup::PeerGroup(const std::string& group_name, const TransportSettings& settings)
    : communicator_("dispatch", group_name), settings_(settings) {
  if (settings_.timeout_ms == 0) settings_.timeout_ms = communicator_.timeout_ms();
}

std::string PeerGroup::name_of(std::int64_t rank) const {
  return "rank " + std::to_string(standing_.first_rank + rank);
}

/// Empty where no rank has trouble; else whose, and this rank's own words.
std::string PeerGroup::agree(const std::string& trouble) const {
  const auto all = tell_all(communicator_, {trouble.empty() ? 0 : 1});
  for (std::size_t g = 0; g < all.size(); ++g) {
    if (all[g][0] == 0) continue;
    return trouble.empty() ? name_of(static_cast<std::int64_t>(g)) + " cannot map memory" : trouble;
  }
  return {};
}

void PeerGroup::open(const char* op, transport::WindowShape shape) {
  refuse_capture(op);
  // Nobody may still use the window that goes, neither here nor, once all have met, elsewhere.
  MOETUNER_CUDA_CHECK(cudaStreamSynchronize(c10::cuda::getCurrentCUDAStream()));
  if (window_) shape = larger(shape, window_->shape());
  const auto all = tell_all(communicator_,
                            {static_cast<std::int64_t>(settings_.transport),
                             shape.num_rows,
                             shape.row_bytes,
                             shape.top_k,
                             shape.slots_per_rank});
  decided_ = true;
  refusal_.clear();
  for (std::size_t g = 0; g < all.size(); ++g) {
    shape = larger(shape, {shape.num_ranks, all[g][1], all[g][2], all[g][3], all[g][4]});
    if (all[g][0] == static_cast<std::int64_t>(Transport::kCollectives)) {
      refusal_ = name_of(static_cast<std::int64_t>(g)) + " is set to collectives";
    }
  }
  shape.num_rows = round_up(std::max<std::int64_t>(shape.num_rows, 1), kRowsAtOnce);
  if (is_captured_) {
    captured_.push_back(std::move(window_));
  } else {
    window_.reset();
  }
  is_captured_ = false;
  if (refusal_.empty() && num_ranks() > transport::kMaxPeers) {
    refusal_ = "there are more than " + std::to_string(transport::kMaxPeers) + " ranks";
  }
  if (num_ranks() * shape.num_rows > kMostRows) {
    refusal_ = "more than " + std::to_string(kMostRows) + " rows may come to a rank";
  }
  if (!refusal_.empty()) return;

  std::string trouble;
  std::unique_ptr<transport::Window> window;
  transport::WindowHandle handle{};
  try {
    window = std::make_unique<transport::Window>(
        shape, rank(), settings_.timeout_ms * 1000000, static_cast<int>(settings_.blocks));
    handle = window->handle();
  } catch (const std::exception& error) {
    trouble = error.what();
  }
  std::vector<std::int64_t> packed(sizeof(handle) / sizeof(std::int64_t));
  static_assert(sizeof(handle) % sizeof(std::int64_t) == 0);
  std::memcpy(packed.data(), &handle, sizeof(handle));
  const auto told = tell_all(communicator_, packed);
  std::vector<transport::WindowHandle> handles(told.size());
  for (std::size_t g = 0; g < told.size(); ++g) {
    std::memcpy(&handles[g], told[g].data(), sizeof(handle));
  }
  refusal_ = agree(trouble);
  if (!refusal_.empty()) return;
  try {
    window->map(handles, standing_);
  } catch (const std::exception& error) {
    trouble = error.what();
  }
  refusal_ = agree(trouble);
  if (refusal_.empty()) window_ = std::move(window);
}

bool PeerGroup::opens(const char* op, const transport::WindowShape& shape) {
  if (!decided_ || (window_ && !window_->shape().holds(shape))) open(op, shape);
  TORCH_CHECK_VALUE(window_ || settings_.transport != Transport::kPeers,
                    op,
                    ": peer memory was asked for and cannot be used: ",
                    refusal_);
  return window_ != nullptr;
}

void PeerGroup::grow(const char* op, const transport::WindowShape& shape) {
  open(op, shape);
  TORCH_CHECK(window_, op, ": peer memory could be used so far and cannot any more: ", refusal_);
}

void PeerGroup::check(const char* op) const {
  if (window_->abort().word != 0) fail(op);
}

void PeerGroup::fail(const char* op) const {
  const transport::Abort abort = window_->abort();
  const double seconds = static_cast<double>(settings_.timeout_ms) / 1000.0;
  TORCH_CHECK_WITH(DistBackendError,
                   abort.word == 0,
                   op,
                   ": ",
                   name_of(abort.waiting()),
                   " waited ",
                   seconds,
                   " s for ",
                   what_of(abort.what()),
                   " of ",
                   name_of(abort.whom()),
                   ", which has ended, stands still or calls other operations; the exchange of "
                   "this group is over on all ranks");
  TORCH_CHECK_WITH(DistBackendError,
                   false,
                   op,
                   ": the device of ",
                   name_of(rank()),
                   " did not come to the exchange within ",
                   seconds,
                   " s: what was enqueued before it has not ended");
}

void PeerGroup::follow_stream() {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const bool captures =
      c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  is_captured_ = is_captured_ || captures;
  if (captures || stream_ == stream.stream()) return;
  if (stream_ != nullptr) {
    cudaEvent_t event = nullptr;
    MOETUNER_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    MOETUNER_CUDA_CHECK(cudaEventRecord(event, static_cast<cudaStream_t>(stream_)));
    MOETUNER_CUDA_CHECK(cudaStreamWaitEvent(stream.stream(), event, 0));
    MOETUNER_CUDA_CHECK(cudaEventDestroy(event));
  }
  stream_ = stream.stream();
}

std::string PeerGroup::describe() const {
  if (window_) {
    return "mapped memory of the ranks, " + std::to_string(window_->device_bytes()) +
           " bytes on each, room for " + std::to_string(window_->shape().num_rows) +
           " rows from rank to rank";
  }
  if (decided_) return "the group's communicator, as " + refusal_;
  if (settings_.transport == Transport::kCollectives) return "the group's communicator";
  return "mapped memory of the ranks, or the group's communicator: the first call on CUDA decides";
}

#endif

}  // namespace moetuner
