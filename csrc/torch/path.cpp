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
  for (const std::string& name : groups) wires_.emplace_back(op, name);
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
    : op_(op), path_(op, groups), send_maps_(send_maps.vec()) {
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
    splits_.emplace_back(op, splits[i], path_.hop(i).num_ranks());
  }
}

at::Tensor Trail::home(at::Tensor rows) const {
  for (std::size_t i = path_.num_hops(); i-- > 0;) {
    const Splits& shares = splits_[i];
    shares.check_received(op_, rows.size(0), path_.hop(i).num_ranks());
    at::Tensor returned;
    {
      const Range range("return");
      returned = path_.hop(i).exchange(rows, shares.received, shares.sent);
    }
    const Range range("sum");
    rows = sum_rows(returned, send_maps_[i], {});
  }
  return rows;
}

at::Tensor Trail::out(at::Tensor rows, std::int64_t num_arrived) const {
  for (std::size_t i = 0; i < path_.num_hops(); ++i) {
    const Splits& shares = splits_[i];
    // Where shares are equal, rows between two hops are those of the map of the second.
    const bool is_last = i + 1 == path_.num_hops();
    const std::int64_t arrive = is_last ? num_arrived : send_maps_[i + 1].size(0);
    const std::int64_t num_sent = shares.num_sent(arrive);
    const at::Tensor sent = std::get<0>(scatter_rows(rows, send_maps_[i], num_sent, {}, {}));
    rows = path_.hop(i).exchange(sent, shares.sent, shares.received);
  }
  return rows;
}

}  // namespace moetuner
