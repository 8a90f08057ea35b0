#pragma once

// A small harness: TEST(name) { CHECK(...); } in files test_*.cpp. The first failure ends a test.

#include <cmath>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace harness {

struct Test {
  std::string file;
  std::string name;
  std::function<void()> body;
};

/// All tests of the program.
std::vector<Test>& tests();

struct Registered {
  Registered(const char* file, const char* name, std::function<void()> body) {
    tests().push_back({file, name, std::move(body)});
  }
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
[[noreturn]] void fail(const char* file, int line, const Parts&... parts) {
  std::ostringstream text;
  text.precision(17);
  text << file << ":" << line << ": ";
  (text << ... << parts);
  throw Failure(text.str());
}

inline bool near(double a, double b, double relative = 1e-12) {
  return std::abs(a - b) <= relative * std::max(std::abs(a), std::abs(b));
}

}  // namespace harness

#define TEST(name)                                                                   \
  static void test_##name();                                                         \
  static const harness::Registered registered_##name(__FILE__, #name, &test_##name); \
  static void test_##name()

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) harness::fail(__FILE__, __LINE__, "not true: " #condition); \
  } while (false)

#define CHECK_EQUAL(found, wanted)                                                    \
  do {                                                                                \
    const auto& found_ = (found);                                                     \
    const auto& wanted_ = (wanted);                                                   \
    if (!(found_ == wanted_)) {                                                       \
      harness::fail(__FILE__, __LINE__, #found " is ", found_, ", wanted ", wanted_); \
    }                                                                                 \
  } while (false)

#define CHECK_NEAR(found, wanted)                                                     \
  do {                                                                                \
    const double found_ = (found);                                                    \
    const double wanted_ = (wanted);                                                  \
    if (!harness::near(found_, wanted_)) {                                            \
      harness::fail(__FILE__, __LINE__, #found " is ", found_, ", wanted ", wanted_); \
    }                                                                                 \
  } while (false)

#define CHECK_THROWS(expression, error)                                               \
  do {                                                                                \
    bool thrown_ = false;                                                             \
    try {                                                                             \
      static_cast<void>(expression);                                                  \
    } catch (const error&) {                                                          \
      thrown_ = true;                                                                 \
    }                                                                                 \
    if (!thrown_) harness::fail(__FILE__, __LINE__, #expression " threw no " #error); \
  } while (false)
