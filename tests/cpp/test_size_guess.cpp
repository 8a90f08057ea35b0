#include "harness.h"
#include "torch/size_guess.h"

#include <vector>

namespace {

using moetuner::SizeGuess;

TEST(a_guess_is_some_more_than_the_last_call_of_the_layer_brought) {
  SizeGuess guess;
  const int first = 0;
  const int second = 0;
  CHECK(!guess.next(&first, 8));
  guess.saw(&first, 8, {.lines = 320, .rows = 3200});
  const auto next = guess.next(&first, 8);
  CHECK(next && next->lines == 320 + 10 + 64 && next->rows == 3200 + 100 + 64);
  CHECK(!guess.next(&first, 9));
  CHECK(!guess.next(&second, 8));
}

TEST(a_guess_follows_the_last_call) {
  SizeGuess guess;
  const int layer = 0;
  guess.saw(&layer, 8, {.lines = 320, .rows = 3200});
  guess.saw(&layer, 8, {.lines = 0, .rows = 0});
  CHECK(guess.next(&layer, 8)->rows == 64);
}

TEST(layers_without_number_do_not_fill_memory) {
  SizeGuess guess;
  const std::vector<int> layers(5000);
  for (const int& layer : layers) guess.saw(&layer, 1, {.lines = 1, .rows = 1});
  CHECK(guess.next(&layers.back(), 1));
  CHECK(!guess.next(&layers.front(), 1));
}

}  // namespace
