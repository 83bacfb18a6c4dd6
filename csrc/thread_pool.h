#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace bagssl {

/// CPUs this process may use, at least 1: its affinity mask, and the quota of its control group,
/// which is how containers are limited.
int available_cpus();

/// The quota alone, rounded up, 0 for none; `root` stands before /proc and /sys, for tests.
int quota_cpus(const std::string& root);

/// A fixed set of threads for loops over independent items.
///
/// The calling thread takes part, so a pool of one has no thread of its own and a loop on it is a
/// plain loop. Items are handed out one by one, which balances images of unequal cost.
class ThreadPool {
 public:
  /// `threads` >= 1 counts the caller.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(threads_.size()) + 1; }

  /// Calls `work(worker, index)` once for each index in [0, count), worker in [0, size()). Returns
  /// when all are done; the first exception is rethrown and the items not yet begun are left out.
  /// One loop at a time: a second caller waits for its turn.
  void parallel_for(int64_t count, const std::function<void(int worker, int64_t index)>& work);

 private:
  void end();
  void run(int worker);
  void take_items(int worker);

  std::vector<std::thread> threads_;
  std::mutex turn_;  // one loop at a time
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int, int64_t)>* work_ = nullptr;
  int64_t next_ = 0, count_ = 0;
  uint64_t loop_ = 0;  // grows by one with each loop
  int busy_ = 0;       // threads that have not finished the current loop
  bool stop_ = false;
  std::exception_ptr error_;
};

/// The process-wide pool of `threads` (0 = all available CPUs). It is made at first use and again
/// after fork(): a child's copy has no threads, so it is left alone (leaked on purpose).
ThreadPool& shared_pool(int threads);

}  // namespace bagssl
