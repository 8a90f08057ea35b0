#include "harness.h"

#include <cstdio>
#include <exception>

namespace harness {

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

}  // namespace harness

/// Runs the tests of a file, by its stem, or all of them. No test at all is a failure.
int main(int count, char** arguments) {
  const std::string wanted = count > 1 ? std::string(arguments[1]) + "." : "";
  int run = 0;
  int failed = 0;
  for (const auto& test : harness::tests()) {
    if (test.file.find(wanted) == std::string::npos) continue;
    ++run;
    try {
      test.body();
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAILED %s\n  %s\n", test.name.c_str(), error.what());
    }
  }
  std::printf("%d of %d tests passed\n", run - failed, run);
  return run > 0 && failed == 0 ? 0 : 1;
}
