#include "loader.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <system_error>

#include "loader_run.h"

namespace bagssl {

Loader::Loader(std::shared_ptr<const Source> source, LoaderOptions options,
               std::vector<Memory> slots, std::vector<int64_t> subset, FallbackDecoder fallback)
    : source_(std::move(source)),
      options_(std::move(options)),
      slots_(std::move(slots)),
      pixels_(slots_.size()),
      subset_(std::move(subset)),
      fallback_(std::move(fallback)),
      state_(std::make_unique<State>()) {
  if (!source_) throw std::invalid_argument("there is no source");
  if (options_.patches < 1 || options_.patches >= 1 << 24) {  // a view is drawn from 24 bits of it
    throw std::invalid_argument("patches must be from 1 to 2^24 - 1");
  }
  if (options_.threads < 1) throw std::invalid_argument("threads must be at least 1");
  if (options_.batches_ahead < 1) throw std::invalid_argument("batches_ahead must be at least 1");
  if (static_cast<int64_t>(slots_.size()) != int64_t{options_.batches_ahead} + kHeldBatches) {
    throw std::invalid_argument("expected batches_ahead + " + std::to_string(kHeldBatches) +
                                " slots, got " + std::to_string(slots_.size()));
  }
  if (options_.augments.empty() || options_.augments.size() != options_.views.size()) {
    throw std::invalid_argument("expected one view description per augmentation");
  }
  if (options_.skip_bad && subset_.empty()) {
    throw std::invalid_argument("bad images are replaced by others of subset, which is empty");
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
  constexpr int64_t kViewBytes = sizeof(ViewParams), kImageBytes = 16;  // offset, height, width
  const int64_t row_bytes =
      options_.cut ? options_.patches * patch_bytes_ : options_.patches * kViewBytes + kImageBytes;
  slot_rows_ = slots_[0].capacity / row_bytes;
  for (const Memory& slot : slots_) slot_rows_ = std::min(slot_rows_, slot.capacity / row_bytes);
}

Loader::~Loader() = default;

std::shared_ptr<Loader::Run> Loader::current() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->run;
}

int Loader::slot_of(const Run& run, int64_t batch) const {
  return static_cast<int>((run.first_position + batch) % static_cast<int64_t>(slots_.size()));
}

void Loader::check_plan(const EpochPlan& plan, int64_t first_batch) const {
  int64_t begin = 0;
  for (int64_t end : plan.batch_ends) {
    if (end < begin || end > static_cast<int64_t>(plan.rows.size())) {
      throw std::invalid_argument("batch_ends must rise and end within the rows");
    }
    if (end - begin > slot_rows_) {
      throw std::invalid_argument("a batch of " + std::to_string(end - begin) +
                                  " images does not fit into slots with room for " +
                                  std::to_string(slot_rows_));
    }
    begin = end;
  }
  if (first_batch < 0 || first_batch > static_cast<int64_t>(plan.batch_ends.size())) {
    throw std::invalid_argument("first_batch is " + std::to_string(first_batch) + " of " +
                                std::to_string(plan.batch_ends.size()));
  }
  for (int64_t row : plan.rows) {
    if (row < 0 || row >= source_->size()) {
      throw std::invalid_argument("index " + std::to_string(row) + " of a data set of " +
                                  std::to_string(source_->size()) + " images");
    }
  }
}

int64_t Loader::start(const EpochPlan& plan, int64_t first_batch, int timeout_ms) {
  check_plan(plan, first_batch);
  std::lock_guard<std::mutex> control(state_->control);
  if (!end_run(current(), timeout_ms)) return -1;
  const auto run = std::make_shared<Run>();
  run->plan = plan;
  run->taken = run->next_batch = first_batch;
  run->first_position = state_->position - first_batch;
  run->slots.resize(slots_.size());
  run->id = ++state_->runs;
  run_threads(run);
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->run = run;
  return run->id;
}

void Loader::run_threads(const std::shared_ptr<Run>& run) {
  while (static_cast<int>(workers_.size()) < options_.threads) {
    workers_.push_back(std::make_unique<Worker>(fallback_, options_.limits));
  }
  const auto self = shared_from_this();
  for (int i = 0; i < options_.threads; ++i) {
    {
      std::lock_guard<std::mutex> lock(run->mutex);
      ++run->alive;
    }
    try {
      run->threads.emplace_back([self, run, i] { self->work(*run, *self->workers_[i]); });
    } catch (const std::system_error& error) {
      {
        std::lock_guard<std::mutex> lock(run->mutex);
        --run->alive;
      }
      while (!end_run(run, 1000)) {
      }
      throw std::system_error(
          error.code(), "cannot start thread " + std::to_string(i + 1) + " of a loader's " +
                            std::to_string(options_.threads) + " (use fewer, by num_threads)");
    }
  }
}

/// With `control` held: stops a run and takes it out of use. False if its threads are not done.
bool Loader::end_run(const std::shared_ptr<Run>& run, int timeout_ms) {
  if (!run) return true;
  int64_t position;
  {
    std::unique_lock<std::mutex> lock(run->mutex);
    run->stop = true;
    run->room.notify_all();
    run->ready.notify_all();
    const auto is_over = [&] { return run->alive == 0; };
    if (!run->ended.wait_for(lock, std::chrono::milliseconds(timeout_ms), is_over)) return false;
    position = run->first_position + run->taken;
  }
  for (std::thread& thread : run->threads) thread.join();
  run->threads.clear();
  std::lock_guard<std::mutex> lock(state_->mutex);
  if (state_->run == run) {
    state_->run.reset();
    state_->position = position;
  }
  return true;
}

bool Loader::stop(int64_t id, int timeout_ms) {
  const std::shared_ptr<Run> run = current();
  if (!run || (id >= 0 && run->id != id)) return true;
  std::lock_guard<std::mutex> control(state_->control);
  return current() != run || end_run(run, timeout_ms);
}

std::vector<int64_t> Loader::unfinished() const {
  std::lock_guard<std::mutex> control(state_->control);
  std::vector<int64_t> images;
  for (const std::unique_ptr<Worker>& worker : workers_) {
    const int64_t index = worker->index;
    if (index >= 0) images.push_back(index);
  }
  return images;
}

void Loader::leave_behind() {
  std::lock_guard<std::mutex> control(state_->control);
  const std::shared_ptr<Run> run = current();
  if (!run) return;
  for (std::thread& thread : run->threads) thread.detach();
  run->threads.clear();
}

Loader::Status Loader::next(int64_t id, int timeout_ms, Batch* batch) {
  const std::shared_ptr<Run> run = current();
  if (!run || run->id != id) return Status::kStopped;
  {
    std::unique_lock<std::mutex> lock(run->mutex);
    const auto is_over = [&] { return run->taken == run->num_batches(); };
    const auto is_made = [&] {
      return run->next_batch > run->taken && run->slots[slot_of(*run, run->taken)].remaining == 0;
    };
    const auto has_news = [&] { return run->stop || is_over() || is_made(); };
    if (run->alive == 0 && !has_news()) {  // a child of fork()
      lock.unlock();
      std::lock_guard<std::mutex> control(state_->control);
      if (run->threads.empty() && current() == run) run_threads(run);
      return Status::kWaiting;
    }
    if (!run->ready.wait_for(lock, std::chrono::milliseconds(timeout_ms), has_news)) {
      return Status::kWaiting;
    }
    if (run->stop) return Status::kStopped;
    if (!is_over()) {
      take(*run, batch);
      return Status::kReady;
    }
  }
  while (!stop(id, timeout_ms)) {  // the threads are past their last read
  }
  return Status::kEnd;
}

/// With the run's lock held.
void Loader::take(Run& run, Batch* batch) {
  batch->slot = slot_of(run, run.taken);
  Slot& slot = run.slots[batch->slot];
  std::sort(slot.skipped.begin(), slot.skipped.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    for (auto& [row, bad] : slot.skipped) {
      if (!state_->skipped_indices.insert(bad.index).second) continue;
      state_->skipped.push_back(std::move(bad));
    }
  }
  batch->pixel_bytes = slot.pixel_bytes;
  batch->indices = std::move(slot.indices);
  batch->error = std::move(slot.error);
  ++run.taken;
  run.room.notify_all();
}

std::vector<BadImage> Loader::skipped() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->skipped;
}

/// Batches that were taken so far.
int64_t Loader::position() const {
  const std::shared_ptr<Run> run = current();
  if (!run) {
    std::lock_guard<std::mutex> lock(state_->mutex);
    return state_->position;
  }
  std::lock_guard<std::mutex> lock(run->mutex);
  return run->first_position + run->taken;
}

void Loader::check_held(int slot) const {
  const int64_t end = position();
  for (int64_t held = std::max<int64_t>(0, end - kHeldBatches); held < end; ++held) {
    if (held % static_cast<int64_t>(slots_.size()) == slot) return;
  }
  throw std::invalid_argument("slot " + std::to_string(slot) + " is not that of a held batch");
}

void Loader::set_slot(int slot, Memory memory) {
  check_held(slot);
  if (memory.capacity < slots_[slot].capacity) {
    throw std::invalid_argument("a slot of " + std::to_string(slots_[slot].capacity) +
                                " bytes may not become smaller");
  }
  slots_[slot] = std::move(memory);
}

void Loader::set_pixels(int slot, Memory memory) {
  check_held(slot);
  pixels_[slot] = std::move(memory);
}

bool Loader::move_pixels(int64_t id, int slot_index, Memory memory) {
  const std::shared_ptr<Run> run = current();
  if (!run || run->id != id) return false;
  check_held(slot_index);
  Slot& slot = run->slots[slot_index];  // nobody else's until two more batches were taken
  const Memory& old = pixels_[slot_index];
  if (memory.capacity < std::max(slot.pixel_bytes, old.capacity)) {
    throw std::invalid_argument("a buffer of " + std::to_string(memory.capacity) +
                                " bytes is too small for the batch's " +
                                std::to_string(slot.pixel_bytes));
  }
  std::copy_n(old.data, std::min(old.capacity, slot.pixel_bytes), memory.data);
  for (const auto& [offset, pixels] : slot.outside) {
    std::copy(pixels.begin(), pixels.end(), memory.data + offset);
  }
  slot.outside.clear();
  pixels_[slot_index] = std::move(memory);
  return true;
}

void Loader::after_fork() {
  // What threads of the parent may have been changing or hold locked is left as it is, for ever.
  State* const old = state_.release();
  state_ = std::make_unique<State>();
  state_->runs = old->runs;
  state_->position = old->position;
  if (old->mutex.try_lock()) {
    state_->skipped = old->skipped;
    state_->skipped_indices = old->skipped_indices;
  }
  for (std::unique_ptr<Worker>& worker : workers_) static_cast<void>(worker.release());
  workers_.clear();
  const Run* const run = old->run.get();
  if (run == nullptr) return;
  state_->position = run->first_position + run->taken;
  if (run->stop) return;
  const auto again = std::make_shared<Run>();
  again->id = run->id;
  again->plan = run->plan;
  again->first_position = run->first_position;
  again->taken = again->next_batch = run->taken;
  again->slots.resize(slots_.size());
  state_->run = again;
}

}  // namespace bagssl
