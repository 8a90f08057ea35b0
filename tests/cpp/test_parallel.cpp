#include "harness.h"
#include "moetuner/planning/parallel.h"

#include <atomic>
#include <vector>

using namespace moetuner;

TEST(every_task_is_done_once) {
  for (const int threads : {0, 1, 3, 64}) {
    std::vector<std::atomic<int>> done(50);
    parallel_for(50, threads, [&](std::int64_t i) { ++done[i]; });
    for (const auto& times : done) CHECK_EQUAL(times.load(), 1);
  }
  parallel_for(0, 4, [](std::int64_t) { throw std::logic_error("there is no task"); });
}

TEST(the_failure_of_a_task_reaches_the_caller) {
  for (const int threads : {1, 4}) {
    CHECK_THROWS(parallel_for(100,
                              threads,
                              [](std::int64_t i) {
                                if (i == 17) throw std::out_of_range("17");
                              }),
                 std::out_of_range);
  }
}

TEST(no_more_threads_than_tasks) {
  CHECK_EQUAL(resolve_threads(8, 3), 3);
  CHECK_EQUAL(resolve_threads(2, 3), 2);
  CHECK_EQUAL(resolve_threads(5, 0), 1);
  CHECK(resolve_threads(0, 1000) >= 1);
}
