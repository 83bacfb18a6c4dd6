#include "thread_pool.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

namespace bagssl {

int available_cpus() {
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

ThreadPool::ThreadPool(int threads) {
  if (threads < 1) {
    throw std::invalid_argument("a thread pool of " + std::to_string(threads) +
                                " threads: at least 1 is needed");
  }
  threads_.reserve(threads - 1);
  for (int worker = 1; worker < threads; ++worker) {
    threads_.emplace_back([this, worker] { run(worker); });
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::parallel_for(int64_t count, const std::function<void(int, int64_t)>& work) {
  if (count <= 0) return;
  std::lock_guard<std::mutex> turn(turn_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    work_ = &work;
    next_ = 0;
    count_ = count;
    error_ = nullptr;
    busy_ = static_cast<int>(threads_.size());
    ++loop_;
  }
  wake_.notify_all();
  take_items(0);

  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [this] { return busy_ == 0; });
  work_ = nullptr;
  if (error_) std::rethrow_exception(error_);
}

void ThreadPool::take_items(int worker) {
  while (true) {
    int64_t index;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (next_ >= count_) return;
      index = next_++;
    }
    try {
      (*work_)(worker, index);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_ = count_;
    }
  }
}

void ThreadPool::run(int worker) {
  uint64_t seen = 0;
  while (true) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return stop_ || loop_ != seen; });
      if (stop_) return;
      seen = loop_;
    }
    take_items(worker);
    std::lock_guard<std::mutex> lock(mutex_);
    if (--busy_ == 0) done_.notify_one();
  }
}

ThreadPool& shared_pool(int threads) {
  struct Pools {
    pid_t pid;
    std::mutex mutex;
    std::map<int, std::unique_ptr<ThreadPool>> by_size;
  };
  // A plain pointer: never destroyed, because threads may still wait in a pool at exit.
  static std::atomic<Pools*> current{nullptr};
  Pools* pools = current.load();
  while (!pools || pools->pid != getpid()) {
    Pools* fresh = new Pools{getpid(), {}, {}};
    if (current.compare_exchange_strong(pools, fresh)) {
      pools = fresh;
    } else {
      delete fresh;
    }
  }
  if (threads <= 0) threads = available_cpus();
  std::lock_guard<std::mutex> lock(pools->mutex);
  std::unique_ptr<ThreadPool>& pool = pools->by_size[threads];
  if (!pool) pool = std::make_unique<ThreadPool>(threads);
  return *pool;
}

}  // namespace bagssl
