#include "peer_group.h"

#include <torch/library.h>

// What carries rows inside a group, chosen and told: see ops/transport.py.

namespace moetuner {
namespace {

constexpr std::int64_t kFewestBlocks = 4;  // some route and send, some place and add up
constexpr std::int64_t kMostBlocks = 1 << 16;

void set(const std::string& group_name,
         std::int64_t transport,
         std::int64_t senders,
         std::int64_t timeout_ms,
         std::int64_t blocks) {
  TORCH_CHECK_VALUE(transport >= 0 && transport <= 2,
                    "set_transport: transport must be 0, 1 or 2, got ",
                    transport);
  TORCH_CHECK_VALUE(senders >= 0, "set_transport: senders must not be negative, got ", senders);
  TORCH_CHECK_VALUE(
      timeout_ms >= 0, "set_transport: timeout_ms must not be negative, got ", timeout_ms);
  TORCH_CHECK_VALUE(blocks == 0 || (blocks >= kFewestBlocks && blocks <= kMostBlocks),
                    "set_transport: blocks must be ",
                    kFewestBlocks,
                    " to ",
                    kMostBlocks,
                    ", or 0 for all, got ",
                    blocks);
  set_transport(group_name, {static_cast<Transport>(transport), senders, timeout_ms, blocks});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moetuner, m) {
  m.def("set_transport(str group, int transport, int senders, int timeout_ms, int blocks) -> ()",
        &set);
  m.def("describe_transport(str group) -> str", &describe_transport);
}

}  // namespace moetuner
