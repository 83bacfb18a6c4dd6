#include <algorithm>
#include <cmath>
#include <exception>
#include <stdexcept>

#include "loader_run.h"

// What the threads of a loader do.

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

void Loader::work(Run& run, Worker& worker) {
  int64_t batch, row;
  while (take_row(run, &batch, &row)) {
    make_row(run, worker, batch, row);
    worker.index = -1;
    std::lock_guard<std::mutex> lock(run.mutex);
    if (--run.slots[slot_of(run, batch)].remaining == 0) run.ready.notify_all();
  }
  std::lock_guard<std::mutex> lock(run.mutex);
  if (--run.alive == 0) run.ended.notify_all();
}

/// Waits for a row to make and takes it; false when there is none left.
bool Loader::take_row(Run& run, int64_t* batch, int64_t* row) {
  std::unique_lock<std::mutex> lock(run.mutex);
  while (true) {
    run.room.wait(lock, [&] {
      return run.stop || run.next_batch == run.num_batches() || run.next_row > 0 ||
             run.next_batch < run.taken + options_.batches_ahead;
    });
    if (run.stop || run.next_batch == run.num_batches()) return false;
    const int64_t rows = run.plan.batch_rows(run.next_batch);
    if (run.next_row == 0) {
      Slot& slot = run.slots[slot_of(run, run.next_batch)];
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
      run.ready.notify_all();
    }
    if (rows > 0) return true;
  }
}

void Loader::make_row(Run& run, Worker& worker, int64_t batch, int64_t row) {
  Slot& slot = run.slots[slot_of(run, batch)];
  const int64_t first = run.plan.rows[run.plan.batch_begin(batch) + row];
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
  worker.index = index;
  const Item item = source_->read(index, worker.file, options_.limits.max_bytes);
  const ImageSize size = worker.reader.open(item);
  worker.params.resize(static_cast<size_t>(options_.patches));
  int64_t top = size.height, left = size.width, bottom = 0, right = 0;
  double least_shrinking = 1e9;  // of a crop box to its patch
  for (int64_t p = 0; p < options_.patches; ++p) {
    const ViewParams& params = worker.params[p] = draw(run, size, index, p);
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
  const int64_t rows = run.plan.batch_rows(batch);
  uint8_t* const patches = slots_[slot_of(run, batch)].data;
  for (int64_t p = 0; p < options_.patches; ++p) {
    patch_view(region.view, worker.params[p], options_.views[p % options_.views.size()],
               patches + (p * rows + row) * patch_bytes_, worker.scratch);
  }
}

/// Writes a row's image and views into the slot, where the images before it end.
void Loader::hand_over(Run& run, const Worker& worker, const ImageView& image, int64_t batch,
                       int64_t row) {
  const int slot_index = slot_of(run, batch);
  const Memory& buffer = pixels_[slot_index];
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
  const int64_t rows = run.plan.batch_rows(batch), patches = options_.patches;
  auto* const params = reinterpret_cast<ViewParams*>(slots_[slot_index].data);
  auto* const offsets = reinterpret_cast<int64_t*>(params + patches * rows);
  auto* const sides = reinterpret_cast<int32_t*>(offsets + rows);
  for (int64_t p = 0; p < patches; ++p) params[p * rows + row] = worker.params[p];
  offsets[row] = offset;
  sides[row] = static_cast<int32_t>(image.height);
  sides[rows + row] = static_cast<int32_t>(image.width);
}

ViewParams Loader::draw(const Run& run, ImageSize size, int64_t index, int64_t patch) const {
  const AugmentSpec& spec = options_.augments[patch % options_.augments.size()];
  switch (options_.sampler) {
    case Sampler::kGrid:
      return grid_view(spec, size.height, size.width, options_.patches, patch);
    case Sampler::kCenter:
      return center_view(size.height, size.width);
    case Sampler::kRandom:
      break;
  }
  const ViewKey key = {options_.seed, run.plan.epoch, static_cast<uint64_t>(index),
                       static_cast<uint64_t>(patch)};
  return draw_view(spec, size.height, size.width, key);
}

int64_t Loader::replacement(int64_t index) const {
  const auto after = std::upper_bound(subset_.begin(), subset_.end(), index);
  return after == subset_.end() ? subset_.front() : *after;
}

}  // namespace bagssl
