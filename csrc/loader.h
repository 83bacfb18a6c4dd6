#pragma once

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
  Limits limits;             // of an image; one that exceeds them is bad
  bool cut = true;           // false: batches are images and tables of views; a device cuts them
};

/// Memory of a slot, kept alive by `owner`.
struct Memory {
  uint8_t* data = nullptr;
  int64_t capacity = 0;  // bytes
  std::shared_ptr<const void> owner;
};

/// The contents of an epoch, decided by the caller: the same for any number of threads.
struct EpochPlan {
  uint64_t epoch = 0;
  std::vector<int64_t> rows;        // data-set indices in the order they are served
  std::vector<int64_t> batch_ends;  // batch b is rows[batch_ends[b - 1], batch_ends[b])

  int64_t batch_begin(int64_t batch) const { return batch == 0 ? 0 : batch_ends[batch - 1]; }
  int64_t batch_rows(int64_t batch) const { return batch_ends[batch] - batch_begin(batch); }
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
/// A bag depends on (seed, epoch, data-set index) only. A batch stays as it is until two more were
/// taken, whatever is started or stopped in between.
///
/// `start`, `next` and `stop` may be called by several threads at once. The threads of a loader
/// share its ownership, because one that waits for a read that does not return is left behind.
class Loader : public std::enable_shared_from_this<Loader> {
 public:
  enum class Status { kReady, kWaiting, kEnd, kStopped };

  /// `slots` are `batches_ahead + kHeldBatches` buffers, each with room for the largest batch.
  /// `subset` holds the data-set indices in use, sorted: a bad image is replaced by the next of
  /// them, cyclically.
  Loader(std::shared_ptr<const Source> source, LoaderOptions options, std::vector<Memory> slots,
         std::vector<int64_t> subset, FallbackDecoder fallback);
  ~Loader();
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  /// Begins an epoch at `first_batch`, after stopping the current one. Returns a number that names
  /// this run of the threads, or -1 if those of the run before have not ended within `timeout_ms`.
  /// Throws std::system_error if a thread cannot be created.
  int64_t start(const EpochPlan& plan, int64_t first_batch, int timeout_ms);

  /// Takes the next batch of a run, waiting for it up to `timeout_ms`. kStopped: the run was
  /// stopped, or another one was started.
  Status next(int64_t run, int timeout_ms, Batch* batch);

  /// Gives a slot other memory before its batch is overwritten. To be called between two calls of
  /// `next` for the slot of one of the latest kHeldBatches batches.
  void set_slot(int slot, Memory memory);

  /// Gives the slot of the latest batch another buffer for pixels, and moves its images there.
  /// Images that did not fit into the old one are in memory of their own until then: to be called
  /// before a batch is used whose `pixel_bytes` exceeds the buffer's capacity. False if the run was
  /// stopped.
  bool move_pixels(int64_t run, int slot, Memory memory);

  /// As `set_slot`, for the pixels.
  void set_pixels(int slot, Memory memory);

  /// Ends a run (the current one for -1) and its threads; unfinished batches are dropped. False if
  /// some have not ended within `timeout_ms`: then call it again, or `leave_behind`.
  bool stop(int64_t run, int timeout_ms);

  /// The images that the threads of a stopped run are still at.
  std::vector<int64_t> unfinished() const;

  /// Gives up waiting for the threads of a stopped run. They end when their reads return.
  void leave_behind();

  /// To be called in the child of fork() before anything else: it has none of the threads, and they
  /// may hold locks. The child continues at the same batch with threads of its own.
  void after_fork();

  /// Images that were replaced so far, each once, in the order in which they were first met.
  std::vector<BadImage> skipped() const;

 private:
  struct Worker;  // a thread's reader and buffers
  struct Slot;
  struct Run;    // an epoch: its plan and threads, their lock, the state of the slots
  struct State;  // what consumers share, and their locks

  std::shared_ptr<Run> current() const;
  void check_plan(const EpochPlan& plan, int64_t first_batch) const;
  int64_t position() const;
  void check_held(int slot) const;
  void run_threads(const std::shared_ptr<Run>& run);
  bool end_run(const std::shared_ptr<Run>& run, int timeout_ms);
  int slot_of(const Run& run, int64_t batch) const;
  void take(Run& run, Batch* batch);

  void work(Run& run, Worker& worker);
  bool take_row(Run& run, int64_t* batch, int64_t* row);
  void make_row(Run& run, Worker& worker, int64_t batch, int64_t row);
  void make_bag(Run& run, Worker& worker, int64_t index, int64_t batch, int64_t row);
  void hand_over(Run& run, const Worker& worker, const ImageView& image, int64_t batch,
                 int64_t row);
  ViewParams draw(const Run& run, ImageSize size, int64_t index, int64_t patch) const;
  int64_t replacement(int64_t index) const;

  const std::shared_ptr<const Source> source_;
  const LoaderOptions options_;
  std::vector<Memory> slots_, pixels_;  // per slot
  const std::vector<int64_t> subset_;
  const FallbackDecoder fallback_;
  int64_t patch_bytes_ = 0;
  int64_t slot_rows_ = 0;  // images that fit into a slot
  std::vector<std::unique_ptr<Worker>> workers_;
  std::unique_ptr<State> state_;
};

}  // namespace bagssl
