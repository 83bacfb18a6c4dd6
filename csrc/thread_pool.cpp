#include "thread_pool.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>

namespace bagssl {

namespace {

/// The CPUs that a folder of a control group allows: quota / period, 0 for no limit.
double cpus_of_group(const std::string& folder) {
  std::ifstream both(folder + "/cpu.max");  // version 2: "max 100000" or "800000 100000"
  std::string quota_text;
  double quota = -1, period = 0;
  if (both >> quota_text >> period) {
    std::istringstream(quota_text) >> quota;
  } else {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

}  // namespace

int quota_cpus(const std::string& root) {
  double least = 0;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "4:cpu,cpuacct:/path", "0::/path"
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && ("," + controllers + ",").find(",cpu,") == std::string::npos) {
      continue;
    }
    const std::string mount =
        root + "/sys/fs/cgroup" + (controllers.empty() ? "" : "/" + controllers);
    // A limit of any group above counts, too. Within a container the path may not exist.
    for (std::string path = line.substr(second + 1);; path.resize(path.rfind('/'))) {
      const double cpus = cpus_of_group(mount + (path == "/" ? "" : path));
      if (cpus > 0 && (least == 0 || cpus < least)) least = cpus;
      if (path.rfind('/') == std::string::npos) break;
    }
  }
  return static_cast<int>(std::ceil(least));
}

int available_cpus() {
  int cpus = static_cast<int>(std::thread::hardware_concurrency());
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) cpus = CPU_COUNT(&set);
  static const int quota = quota_cpus("");
  if (quota > 0) cpus = std::min(cpus, quota);
#endif
  return std::max(1, cpus);
}

ThreadPool::ThreadPool(int threads) {
  if (threads < 1) {
    throw std::invalid_argument("a thread pool of " + std::to_string(threads) +
                                " threads: at least 1 is needed");
  }
  for (int worker = 1; worker < threads; ++worker) {
    try {
      threads_.emplace_back([this, worker] { run(worker); });
    } catch (const std::system_error& error) {
      end();
      throw std::system_error(error.code(), "cannot start thread " + std::to_string(worker + 1) +
                                                " of " + std::to_string(threads));
    }
  }
}

ThreadPool::~ThreadPool() { end(); }

void ThreadPool::end() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
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
