#include "loader.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>

namespace bagssl {
namespace {

/// After this many bad images in a row the data set as a whole is at fault.
constexpr int kMaxReplacements = 1000;

/// Brings boxes that were drawn on the whole image to the part of it that was decoded.
void move_boxes(const Region& region, std::vector<ViewParams>* table) {
  for (ViewParams& params : *table) {
    if (region.denominator > 1) {
      // The nearest whole box of the smaller image.
      const float scale = static_cast<float>(region.denominator);
      const float end_y = params.top + params.height, end_x = params.left + params.width;
      params.top = std::floor(params.top / scale + 0.5f);
      params.left = std::floor(params.left / scale + 0.5f);
      params.height = std::max(1.0f, std::floor(end_y / scale + 0.5f) - params.top);
      params.width = std::max(1.0f, std::floor(end_x / scale + 0.5f) - params.left);
      const float last_y = static_cast<float>(region.top + region.view.height);
      const float last_x = static_cast<float>(region.left + region.view.width);
      params.top = std::min(params.top, last_y - params.height);
      params.left = std::min(params.left, last_x - params.width);
    }
    params.top -= static_cast<float>(region.top);
    params.left -= static_cast<float>(region.left);
  }
}

}  // namespace

struct Loader::Worker {
  Worker(const FallbackDecoder& fallback, int64_t max_pixels) : reader(fallback, max_pixels) {}
  ImageReader reader;
  Scratch scratch;
  std::vector<uint8_t> file;
  std::vector<ViewParams> params;
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
  std::mutex mutex;
  std::condition_variable room, ready;
  int64_t next_batch = 0, next_row = 0;  // the next row to make
  int64_t released = 0;                  // batches whose slots may be reused
  int64_t num_batches = 0;
  bool stop = false;
  std::vector<Slot> slots;
  std::vector<std::thread> threads;
};

Loader::Loader(std::shared_ptr<const Source> source, LoaderOptions options,
               std::vector<void*> slots, std::vector<int64_t> subset, FallbackDecoder fallback)
    : source_(std::move(source)),
      options_(std::move(options)),
      slots_(std::move(slots)),
      pixels_(slots_.size()),
      subset_(std::move(subset)),
      fallback_(std::move(fallback)),
      pid_(getpid()) {
  if (options_.patches < 1) throw std::invalid_argument("patches must be at least 1");
  if (options_.threads < 1) throw std::invalid_argument("threads must be at least 1");
  if (options_.batches_ahead < 1) throw std::invalid_argument("batches_ahead must be at least 1");
  if (static_cast<int>(slots_.size()) != options_.batches_ahead + kHeldBatches) {
    throw std::invalid_argument("expected batches_ahead + " + std::to_string(kHeldBatches) +
                                " slots, got " + std::to_string(slots_.size()));
  }
  if (options_.augments.empty() || options_.augments.size() != options_.views.size()) {
    throw std::invalid_argument("expected one view description per augmentation");
  }
  for (const AugmentSpec& spec : options_.augments) check_spec(spec);
  const ViewOptions& first = options_.views[0];
  for (const ViewOptions& view : options_.views) {
    check_options(view);
    if (view.out_h != first.out_h || view.out_w != first.out_w || view.dtype != first.dtype) {
      throw std::invalid_argument(
          "all augmentations of a loader must have one patch size and dtype");
    }
  }
  patch_bytes_ = int64_t{first.out_h} * first.out_w * 3 * dtype_size(first.dtype);
}

Loader::~Loader() { stop(); }

int64_t Loader::batch_begin(int64_t batch) const {
  return batch == 0 ? 0 : plan_.batch_ends[batch - 1];
}

int64_t Loader::batch_rows(int64_t batch) const {
  return plan_.batch_ends[batch] - batch_begin(batch);
}

void Loader::start(EpochPlan plan, int64_t first_batch) {
  stop();
  plan_ = std::move(plan);
  int64_t begin = 0;
  for (int64_t end : plan_.batch_ends) {
    if (end < begin || end > static_cast<int64_t>(plan_.rows.size())) {
      throw std::invalid_argument("batch_ends must rise and end within the rows");
    }
    begin = end;
  }
  for (int64_t row : plan_.rows) {
    if (row < 0 || row >= source_->size()) {
      throw std::invalid_argument("index " + std::to_string(row) + " of a data set of " +
                                  std::to_string(source_->size()) + " images");
    }
  }
  taken_ = first_batch;
  run_threads();
}

void Loader::run_threads() {
  run_ = std::make_unique<Run>();
  pid_ = getpid();
  Run& run = *run_;
  run.num_batches = static_cast<int64_t>(plan_.batch_ends.size());
  run.next_batch = run.released = taken_;
  run.slots.resize(slots_.size());
  while (static_cast<int>(workers_.size()) < options_.threads) {
    workers_.push_back(std::make_unique<Worker>(fallback_, options_.max_pixels));
  }
  for (int i = 0; i < options_.threads; ++i) {
    run.threads.emplace_back([this, &run, i] { work(run, *workers_[i]); });
  }
}

void Loader::stop() {
  if (!run_) return;
  if (pid_ != getpid()) {
    // A child of fork() has none of these threads, and they may hold its locks forever.
    static_cast<void>(run_.release());
    for (std::unique_ptr<Worker>& worker : workers_) static_cast<void>(worker.release());
    workers_.clear();
    return;
  }
  {
    std::lock_guard<std::mutex> lock(run_->mutex);
    run_->stop = true;
  }
  run_->room.notify_all();
  for (std::thread& thread : run_->threads) thread.join();
  run_.reset();
}

Loader::Status Loader::next(int timeout_ms, Batch* batch) {
  if (!run_) return Status::kEnd;
  if (pid_ != getpid()) {
    stop();
    run_threads();
  }
  Run& run = *run_;
  if (taken_ == run.num_batches) {
    stop();
    return Status::kEnd;
  }
  const int slot_index = static_cast<int>(taken_ % static_cast<int64_t>(slots_.size()));
  {
    std::unique_lock<std::mutex> lock(run.mutex);
    Slot& slot = run.slots[slot_index];
    const auto is_made = [&] { return run.next_batch > taken_ && slot.remaining == 0; };
    if (!run.ready.wait_for(lock, std::chrono::milliseconds(timeout_ms), is_made)) {
      return Status::kWaiting;
    }
    std::sort(slot.skipped.begin(), slot.skipped.end(),
              [](const auto& a, const auto& b) { return a.first < b.first; });
    for (auto& [row, bad] : slot.skipped) {
      if (skipped_indices_.insert(bad.index).second) skipped_.push_back(std::move(bad));
    }
    batch->slot = slot_index;
    batch->pixel_bytes = slot.pixel_bytes;
    batch->indices = std::move(slot.indices);
    batch->error = std::move(slot.error);
    ++taken_;
    run.released = std::max<int64_t>(run.released, taken_ - kHeldBatches);
  }
  run.room.notify_all();
  return Status::kReady;
}

void Loader::move_pixels(int slot_index, PixelBuffer buffer) {
  if (!run_ || taken_ == 0 || slot_index != (taken_ - 1) % static_cast<int64_t>(slots_.size())) {
    throw std::invalid_argument("only the slot of the latest batch may get another buffer");
  }
  Slot& slot = run_->slots[slot_index];  // the consumer owns it until the next batch is taken
  PixelBuffer& old = pixels_[slot_index];
  if (buffer.capacity < std::max(slot.pixel_bytes, old.capacity)) {
    throw std::invalid_argument("a buffer of " + std::to_string(buffer.capacity) +
                                " bytes is too small for the batch's " +
                                std::to_string(slot.pixel_bytes));
  }
  std::copy_n(old.data, std::min(old.capacity, slot.pixel_bytes), buffer.data);
  for (const auto& [offset, pixels] : slot.outside) {
    std::copy(pixels.begin(), pixels.end(), buffer.data + offset);
  }
  slot.outside.clear();
  old = buffer;
}

void Loader::work(Run& run, Worker& worker) {
  int64_t batch, row;
  while (take_row(run, &batch, &row)) {
    make_row(run, worker, batch, row);
    std::lock_guard<std::mutex> lock(run.mutex);
    if (--run.slots[batch % slots_.size()].remaining == 0) run.ready.notify_one();
  }
}

/// Waits for a row to make and takes it; false when there is none left.
bool Loader::take_row(Run& run, int64_t* batch, int64_t* row) {
  const int64_t num_slots = static_cast<int64_t>(slots_.size());
  std::unique_lock<std::mutex> lock(run.mutex);
  while (true) {
    run.room.wait(lock, [&] {
      return run.stop || run.next_batch == run.num_batches || run.next_row > 0 ||
             run.next_batch < run.released + num_slots;
    });
    if (run.stop || run.next_batch == run.num_batches) return false;
    const int64_t rows = batch_rows(run.next_batch);
    if (run.next_row == 0) {
      Slot& slot = run.slots[run.next_batch % num_slots];
      slot = Slot();
      slot.remaining = rows;
      slot.indices.resize(static_cast<size_t>(rows));
    }
    *batch = run.next_batch;
    *row = run.next_row++;
    if (run.next_row >= rows) {
      ++run.next_batch;
      run.next_row = 0;
      // Threads may be waiting for the end of the plan, the consumer for a batch without rows.
      run.room.notify_all();
      run.ready.notify_one();
    }
    if (rows > 0) return true;
  }
}

void Loader::make_row(Run& run, Worker& worker, int64_t batch, int64_t row) {
  Slot& slot = run.slots[batch % slots_.size()];
  const int64_t first = plan_.rows[batch_begin(batch) + row];
  int64_t index = first;
  BadImage error;
  for (int replaced = 1;; ++replaced) {
    try {
      make_bag(run, worker, index, batch, row);
      break;
    } catch (const std::runtime_error& bad) {  // of the image
      if (!options_.skip_bad) {
        error = {index, bad.what()};
        break;
      }
      {
        std::lock_guard<std::mutex> lock(run.mutex);
        slot.skipped.push_back({row, {index, bad.what()}});
      }
      index = replacement(index);
      if (index == first || replaced == kMaxReplacements) {
        error = {first, "none of the " + std::to_string(replaced) +
                            " images from this one on can be decoded; the last one: " + bad.what()};
        break;
      }
    } catch (const std::exception& failure) {  // of the options, or of memory
      error = {index, failure.what()};
      break;
    }
  }
  std::lock_guard<std::mutex> lock(run.mutex);
  slot.indices[row] = index;
  // Of several errors, the first row's is reported, whichever thread came first.
  if (error.index >= 0 && (slot.error_row < 0 || row < slot.error_row)) {
    slot.error_row = row;
    slot.error = std::move(error);
  }
}

void Loader::make_bag(Run& run, Worker& worker, int64_t index, int64_t batch, int64_t row) {
  const ImageSize size = worker.reader.open(source_->read(index, worker.file));
  worker.params.resize(static_cast<size_t>(options_.patches));
  int64_t top = size.height, left = size.width, bottom = 0, right = 0;
  double least_shrinking = 1e9;  // of a crop box to its patch
  for (int64_t p = 0; p < options_.patches; ++p) {
    const ViewParams& params = worker.params[p] = draw(size, index, p);
    const ViewOptions& view = options_.views[p % options_.views.size()];
    top = std::min(top, static_cast<int64_t>(params.top));
    left = std::min(left, static_cast<int64_t>(params.left));
    bottom = std::max(bottom, static_cast<int64_t>(params.top + params.height));
    right = std::max(right, static_cast<int64_t>(params.left + params.width));
    least_shrinking = std::min(
        {least_shrinking, double{params.height} / view.out_h, double{params.width} / view.out_w});
  }
  int denominator = 1;
  while (options_.dct_scaling && denominator < 8 && least_shrinking >= 2 * denominator) {
    denominator *= 2;
  }

  const Region region = worker.reader.decode({top, left, bottom - top, right - left}, denominator);
  move_boxes(region, &worker.params);
  if (!options_.cut) {
    hand_over(run, worker, region.view, batch, row);
    return;
  }
  const int64_t rows = batch_rows(batch);
  char* const patches = static_cast<char*>(slots_[batch % slots_.size()]);
  for (int64_t p = 0; p < options_.patches; ++p) {
    patch_view(region.view, worker.params[p], options_.views[p % options_.views.size()],
               patches + (p * rows + row) * patch_bytes_, worker.scratch);
  }
}

/// Writes a row's image and views into the slot, where the images before it end.
void Loader::hand_over(Run& run, const Worker& worker, const ImageView& image, int64_t batch,
                       int64_t row) {
  const size_t slot_index = static_cast<size_t>(batch) % slots_.size();
  const PixelBuffer buffer = pixels_[slot_index];
  const int64_t line = image.width * 3, bytes = image.height * line;
  int64_t offset = 0;
  uint8_t* out = nullptr;
  {
    std::lock_guard<std::mutex> lock(run.mutex);
    Slot& slot = run.slots[slot_index];
    offset = slot.pixel_bytes;
    slot.pixel_bytes += bytes;
    if (slot.pixel_bytes <= buffer.capacity) {
      out = buffer.data + offset;
    } else {
      slot.outside.emplace_back(offset, std::vector<uint8_t>(static_cast<size_t>(bytes)));
      out = slot.outside.back().second.data();  // stays where it is when its vector moves
    }
  }
  for (int64_t y = 0; y < image.height; ++y) {
    std::copy_n(image.data + y * image.row_stride, line, out + y * line);
  }
  const int64_t rows = batch_rows(batch), patches = options_.patches;
  auto* const params = static_cast<ViewParams*>(slots_[slot_index]);
  auto* const offsets = reinterpret_cast<int64_t*>(params + patches * rows);
  auto* const sides = reinterpret_cast<int32_t*>(offsets + rows);
  for (int64_t p = 0; p < patches; ++p) params[p * rows + row] = worker.params[p];
  offsets[row] = offset;
  sides[row] = static_cast<int32_t>(image.height);
  sides[rows + row] = static_cast<int32_t>(image.width);
}

ViewParams Loader::draw(ImageSize size, int64_t index, int64_t patch) const {
  const AugmentSpec& spec = options_.augments[patch % options_.augments.size()];
  switch (options_.sampler) {
    case Sampler::kGrid:
      return grid_view(spec, size.height, size.width, options_.patches, patch);
    case Sampler::kCenter:
      return center_view(size.height, size.width);
    case Sampler::kRandom:
      break;
  }
  const ViewKey key = {options_.seed, plan_.epoch, static_cast<uint64_t>(index),
                       static_cast<uint64_t>(patch)};
  return draw_view(spec, size.height, size.width, key);
}

int64_t Loader::replacement(int64_t index) const {
  const auto after = std::upper_bound(subset_.begin(), subset_.end(), index);
  return after == subset_.end() ? subset_.front() : *after;
}

}  // namespace bagssl
