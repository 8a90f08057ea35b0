#include "harness.h"
#include "planning/search/pace.h"

#include <chrono>
#include <cmath>

using namespace moetuner;

namespace {

/// Time that passes when a test says so.
struct FakeClock {
  using duration = std::chrono::duration<double>;
  using time_point = std::chrono::time_point<FakeClock, duration>;
  static inline double seconds = 0.0;
  static time_point now() { return time_point(duration(seconds)); }
};

SearchOptions options_of(std::int64_t proposals, bool fills_time) {
  return {proposals, 1, 1.0, 0.1, 0, 1, 100.0, fills_time};
}

/// Seconds of ten layers one after the other, a millisecond for each proposal.
double searched(const SearchOptions& options) {
  FakeClock::seconds = 0.0;
  Pace<FakeClock> pace(options, 10);
  for (int layer = 0; layer < 10; ++layer) {
    const auto began = FakeClock::now();
    const std::int64_t proposals = pace.begin();
    FakeClock::seconds += 1e-3 * static_cast<double>(proposals);
    pace.end(proposals, began);
  }
  return FakeClock::seconds;
}

}  // namespace

TEST(layers_get_as_many_proposals_as_there_is_time_for) {
  for (const std::int64_t guess : {2'000, 9'500, 30'000}) {
    const double took = searched(options_of(guess, true));
    CHECK(90.0 < took && took <= 100.0);
  }
}

TEST(a_guess_that_is_far_off_is_kept_to_in_part) {
  CHECK(searched(options_of(10, true)) <= 0.01 * (1 + 9 * 8));
}

TEST(all_layers_get_the_same_where_time_shall_not_be_filled) {
  CHECK(std::abs(searched(options_of(64, false)) - 0.64) < 1e-9);
}
