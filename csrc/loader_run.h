#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "loader.h"

namespace bagssl {

struct Loader::Worker {
  Worker(const FallbackDecoder& fallback, const Limits& limits) : reader(fallback, limits) {}
  ImageReader reader;
  Scratch scratch;
  ByteBuffer file;
  std::vector<ViewParams> params;
  std::atomic<int64_t> index{-1};  // of the image at work
};

struct Loader::Slot {
  int64_t remaining = 0;
  int64_t pixel_bytes = 0;
  std::vector<std::pair<int64_t, std::vector<uint8_t>>> outside;  // did not fit: offset, pixels
  std::vector<int64_t> indices;
  std::vector<std::pair<int64_t, BadImage>> skipped;  // with their rows
  int64_t error_row = -1;
  BadImage error;
};

struct Loader::Run {
  int64_t id = 0;
  EpochPlan plan;
  int64_t first_position = 0;  // batch b is the first_position + b-th of all that were ever taken
  std::vector<std::thread> threads;

  std::mutex mutex;  // of all below
  std::condition_variable room, ready, ended;
  int64_t next_batch = 0, next_row = 0;  // the next row to make
  int64_t taken = 0;                     // batches that consumers have taken, or begun after
  int alive = 0;                         // threads
  bool stop = false;
  std::vector<Slot> slots;

  int64_t num_batches() const { return static_cast<int64_t>(plan.batch_ends.size()); }
};

struct Loader::State {
  std::mutex control;        // one start or stop at a time
  mutable std::mutex mutex;  // of all below, never held while waiting
  std::shared_ptr<Run> run;
  int64_t runs = 0;      // started so far
  int64_t position = 0;  // batches that were taken in all runs before this one
  std::vector<BadImage> skipped;
  std::unordered_set<int64_t> skipped_indices;
};

}  // namespace bagssl
