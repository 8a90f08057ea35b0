#include "path.h"

#include "ranges.h"
#include "routing_args.h"
#include "unpermute_ops.h"

#include <numeric>
#include <utility>

namespace moetuner {
namespace {

void check_map(const char* op, const at::Tensor& map) {
  TORCH_CHECK_VALUE(map.dim() == 2, op, ": send_map must be 2-D, got ", map.sizes());
  TORCH_CHECK_TYPE(
      map.scalar_type() == at::kInt, op, ": send_map must be int32, got ", map.scalar_type());
}

}  // namespace

Path::Path(const char* op, const std::vector<std::string>& groups) {
  TORCH_CHECK_VALUE(groups.size() == 1 || groups.size() == 2,
                    op,
                    ": groups must be one, or one between nodes and one inside a node, got ",
                    groups.size());
  for (const std::string& name : groups) hops_.emplace_back(op, name);
}

std::int64_t Path::num_ranks() const {
  return crosses_nodes() ? between_nodes().num_ranks() * last().num_ranks() : last().num_ranks();
}

std::int64_t Path::rank() const {
  return crosses_nodes() ? between_nodes().rank() * last().num_ranks() + last().rank()
                         : last().rank();
}

Trail::Trail(const char* op,
             const std::vector<std::string>& groups,
             at::TensorList send_maps,
             at::TensorList splits)
    : op_(op), path_(op, groups) {
  TORCH_CHECK_VALUE(send_maps.size() == groups.size() && splits.size() == groups.size(),
                    op,
                    ": there must be a send_map and splits for each of the ",
                    groups.size(),
                    " groups, got ",
                    send_maps.size(),
                    " and ",
                    splits.size());
  for (std::size_t i = 0; i < groups.size(); ++i) {
    check_map(op, send_maps[i]);
    hops_.push_back({groups[i], send_maps[i], Splits(op, splits[i], path_.hop(i).num_ranks())});
  }
}

at::Tensor Trail::home(at::Tensor rows, std::size_t hops) const {
  for (std::size_t i = hops; i-- > 0;) {
    const Splits& shares = hops_[i].shares;
    shares.check_received(op_, rows.size(0), path_.hop(i).num_ranks());
    at::Tensor returned;
    {
      const Range range("return");
      returned = path_.hop(i).exchange(rows, shares.received, shares.sent);
    }
    const Range range("sum");
    rows = sum_rows(returned, hops_[i].send_map, {});
  }
  return rows;
}

at::Tensor Trail::out(at::Tensor rows, std::size_t hops, std::int64_t num_arrived) const {
  for (std::size_t i = 0; i < hops; ++i) {
    const Splits& shares = hops_[i].shares;
    // Where shares are equal, rows between two hops are those of the map of the second.
    const bool is_last = i + 1 == num_hops();
    const std::int64_t arrive = is_last ? num_arrived : hops_[i + 1].send_map.size(0);
    const std::int64_t num_sent = shares.num_sent(arrive);
    const at::Tensor sent = std::get<0>(scatter_rows(rows, hops_[i].send_map, num_sent, {}, {}));
    rows = path_.hop(i).exchange(sent, shares.sent, shares.received);
  }
  return rows;
}

}  // namespace moetuner
