#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "image_reader.h"
#include "patch_views.h"
#include "source.h"
#include "view_params.h"

namespace bagssl {

enum class Sampler { kRandom, kGrid, kCenter };

/// Batches that are not overwritten after they were taken: the latest and the one before it, so
/// that a copy to a device may still be running when the next batch is requested.
constexpr int kHeldBatches = 2;

struct LoaderOptions {
  int64_t patches = 1;  // P
  Sampler sampler = Sampler::kRandom;
  std::vector<AugmentSpec> augments;  // slot p is drawn from augments[p % augments.size()]
  std::vector<ViewOptions> views;     // and made with its views[...]; one size and type for all
  uint64_t seed = 0;
  int threads = 1;
  int batches_ahead = 2;
  bool skip_bad = false;     // replace images that cannot be decoded
  bool dct_scaling = false;  // decode at 1/2, 1/4, 1/8 where patches need no more
  int64_t max_pixels = 0;    // larger images are refused
  bool cut = true;           // false: batches are images and tables of views; a device cuts them
};

/// A slot's decoded images, one after another, when patches are not cut here.
struct PixelBuffer {
  uint8_t* data = nullptr;
  int64_t capacity = 0;  // bytes
};

/// The contents of an epoch, decided by the caller: the same for any number of threads.
struct EpochPlan {
  uint64_t epoch = 0;
  std::vector<int64_t> rows;        // data-set indices in the order they are served
  std::vector<int64_t> batch_ends;  // batch b is rows[batch_ends[b - 1], batch_ends[b])
};

struct BadImage {
  int64_t index = -1;
  std::string reason;
};

/// A batch in its slot. Cut here, that is patches [P, rows, h, w, 3]. Otherwise it is a table:
/// float params [P, rows, 16], int64 offsets [rows], int32 heights [rows], int32 widths [rows], and
/// image r is [heights[r], widths[r], 3] at offsets[r] of the slot's pixels. An image is the part
/// of the file that its views use, and boxes are relative to that part; images are stored in the
/// order in which they were decoded.
struct Batch {
  int slot = -1;
  int64_t pixel_bytes = 0;       // of all images; 0 where patches are cut here
  std::vector<int64_t> indices;  // data-set index per row: the replacement's where one was needed
  BadImage error;                // index >= 0: the batch is not usable, and why
};

/// Makes batches of bags ahead of their consumer: threads decode each image once, cut its P patches
/// while it is in cache, and write them into a ring of slots that the caller provides. With `cut`
/// false they write the decoded images instead, for a device to cut.
///
/// A bag depends on (seed, epoch, data-set index) only. All methods are for one consumer thread.
/// After fork() a child's loader starts threads of its own and continues at the same batch.
class Loader {
 public:
  enum class Status { kReady, kWaiting, kEnd };

  /// `slots` are `batches_ahead + kHeldBatches` buffers, each with room for the largest batch.
  /// `subset` holds the data-set indices in use, sorted: a bad image is replaced by the next of
  /// them, cyclically.
  Loader(std::shared_ptr<const Source> source, LoaderOptions options, std::vector<void*> slots,
         std::vector<int64_t> subset, FallbackDecoder fallback);
  ~Loader();
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  /// Begins an epoch at `first_batch`, after stopping the current one.
  void start(EpochPlan plan, int64_t first_batch);

  /// Takes the next batch, waiting for it up to `timeout_ms`. The next kHeldBatches - 1 calls do
  /// not overwrite it.
  Status next(int timeout_ms, Batch* batch);

  /// Gives the slot of the latest batch another pixel buffer, and moves its images there. Images
  /// that did not fit into the old one are in memory of their own until then: to be called before a
  /// batch is used whose `pixel_bytes` exceeds the capacity of the slot's buffer.
  void move_pixels(int slot, PixelBuffer buffer);

  /// Ends the epoch and its threads; unfinished batches are dropped.
  void stop();

  /// Images that were replaced so far, each once, in the order in which they were first met.
  const std::vector<BadImage>& skipped() const { return skipped_; }

 private:
  struct Worker;  // a thread's reader and buffers
  struct Slot;
  struct Run;  // the current epoch: threads, their lock, the state of the slots

  void run_threads();
  void work(Run& run, Worker& worker);
  bool take_row(Run& run, int64_t* batch, int64_t* row);
  void make_row(Run& run, Worker& worker, int64_t batch, int64_t row);
  void make_bag(Run& run, Worker& worker, int64_t index, int64_t batch, int64_t row);
  void hand_over(Run& run, const Worker& worker, const ImageView& image, int64_t batch,
                 int64_t row);
  ViewParams draw(ImageSize size, int64_t index, int64_t patch) const;
  int64_t replacement(int64_t index) const;
  int64_t batch_begin(int64_t batch) const;
  int64_t batch_rows(int64_t batch) const;

  const std::shared_ptr<const Source> source_;
  const LoaderOptions options_;
  const std::vector<void*> slots_;
  std::vector<PixelBuffer> pixels_;  // per slot
  const std::vector<int64_t> subset_;
  const FallbackDecoder fallback_;
  int64_t patch_bytes_ = 0;

  EpochPlan plan_;
  int64_t taken_ = 0;  // batches of the epoch that the consumer has taken
  std::vector<std::unique_ptr<Worker>> workers_;
  std::unique_ptr<Run> run_;
  pid_t pid_;
  std::vector<BadImage> skipped_;
  std::unordered_set<int64_t> skipped_indices_;
};

}  // namespace bagssl
