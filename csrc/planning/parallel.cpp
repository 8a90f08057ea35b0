#include "moetuner/planning/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace moetuner {

int resolve_threads(int requested, std::int64_t tasks) {
  const int available = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const std::int64_t wanted = requested > 0 ? requested : available;
  return static_cast<int>(std::clamp<std::int64_t>(wanted, 1, std::max<std::int64_t>(tasks, 1)));
}

void parallel_for(std::int64_t count,
                  int num_threads,
                  const std::function<void(std::int64_t)>& body) {
  std::atomic<std::int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto work = [&] {
    for (std::int64_t i = next++; i < count; i = next++) {
      try {
        body(i);
      } catch (...) {
        const std::lock_guard lock(failure_mutex);
        if (!failure) failure = std::current_exception();
        next = count;
      }
    }
  };
  std::vector<std::thread> threads;
  const int wanted = resolve_threads(num_threads, count);
  threads.reserve(static_cast<std::size_t>(wanted));
  try {
    for (int t = 1; t < wanted; ++t) threads.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: this one and those that began do all the work.
  }
  work();
  for (auto& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace moetuner
