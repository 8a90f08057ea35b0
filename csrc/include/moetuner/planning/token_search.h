#pragma once

#include "moetuner/planning/search_task.h"
#include "moetuner/planning/tally.h"

#include <cstdint>

namespace moetuner {

/// A search that walks every token: homes that follow or are recorded, and replicas.
///
/// Tokens travel by the rules of `tally_routing` from the home that is given for their first layer.
/// With `follow` a layer is searched while its neighbours stand still: even layers, then odd ones,
/// `sweeps` times. A layer's cost holds its way to the next one too.
struct TokenSearchArgs : SearchTask {
  const std::int64_t* token;  // [T], number by which replicas are picked
  Wire wire;
  bool replicas;               // slots that can be spared may take copies
  std::int32_t* slot_experts;  // [L, P], -1: empty; start in, end of the search out
};

/// Every expert keeps a slot and no rank holds one twice. The result depends on the arguments
/// alone, not on the threads, unless `seconds` or `stop` ends it. It may be worse than the start.
void search_tokens(const TokenSearchArgs& args);

}  // namespace moetuner
