#pragma once

#include <cstdint>
#include <functional>

namespace moetuner {

/// Threads to use: `requested`, or the machine's own number when it is 0; never more than `tasks`.
int resolve_threads(int requested, std::int64_t tasks);

/// Calls `body(i)` once for every i in [0, count), on up to `num_threads` threads.
///
/// Tasks are taken one by one, so uneven ones balance. The first exception of a task is rethrown
/// after all threads have ended.
void parallel_for(std::int64_t count,
                  int num_threads,
                  const std::function<void(std::int64_t)>& body);

}  // namespace moetuner
