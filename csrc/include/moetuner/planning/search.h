#pragma once

#include "moetuner/planning/search_task.h"

#include <cstdint>

namespace moetuner {

/// Annealed swaps in every layer; uniform homes do not couple layers.
///
/// Tokens with a home need no row to it. With `follow` a token goes on from the rank of its first
/// expert: even layers, then odd ones are searched while their neighbours stand still, `sweeps`
/// times, ever cooler.
///
/// Some of the P slots hold the number of no expert (>= E): they are empty. Homes are uniform where
/// `home` is null.
struct SearchArgs : SearchTask {
  const std::int32_t* load;       // [S, L, E], rows of each expert
  const std::uint8_t* active;     // [S, L, E], 1: the expert has rows in such a batch
  bool dedup;                     // one row per distinct rank, else one per expert
  bool gather;                    // rows go everywhere: only loads count; not with dedup
  const std::int32_t* stay_rank;  // [L, E], where experts are now; null: nowhere
  double move_seconds;            // what every expert that is elsewhere then adds
  std::int32_t* rank_of;          // [L, P], rank of each expert and empty slot; start in, best out
};

/// Improves every layer of `rank_of`. With uniform homes it never returns a worse search cost than
/// it was given.
///
/// The result depends on the arguments alone, not on the threads, as long as neither `seconds` nor
/// `stop` ends it.
void search_layers(const SearchArgs& args);

}  // namespace moetuner
