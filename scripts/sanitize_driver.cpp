// The C++ data path without Python, for sanitizers: every thread, every way to end, bad images.
//   sanitize_driver SHARD.tar
// Exits 0 if the loader gives the same bags by any number of threads.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "loader.h"
#include "source.h"
#include "tar_index.h"
#include "thread_pool.h"

namespace {

using bagssl::Batch;
using bagssl::Loader;

constexpr int64_t kBatchSize = 16, kPatches = 4, kSide = 24;
constexpr int64_t kPatchBytes = kSide * kSide * 3 * 4;
constexpr int kBatchesAhead = 2;

void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

std::shared_ptr<const bagssl::Source> open_shard(const std::string& path, int64_t limit) {
  const bagssl::MappedFile file(path);
  bagssl::TarIndex index = bagssl::index_tar(file.data(), file.size());
  require(index.damage.empty(), index.damage.c_str());
  if (static_cast<int64_t>(index.sizes.size()) > limit) {
    index.sizes.resize(limit);
    index.offsets.resize(limit);
  }
  // Every seventh image is cut short.
  for (size_t i = 0; i < index.sizes.size(); i += 7) index.sizes[i] /= 2;
  std::vector<int32_t> shard(index.sizes.size(), 0);
  return std::make_shared<bagssl::ShardSource>(std::vector<std::string>{path}, std::move(shard),
                                               std::move(index.offsets), std::move(index.sizes));
}

/// The ring's memory and a loader over it.
struct Setup {
  Setup(std::shared_ptr<const bagssl::Source> source, int threads) {
    bagssl::LoaderOptions options;
    options.patches = kPatches;
    bagssl::AugmentSpec spec;
    spec.scale[0] = 0.2;
    spec.hflip = spec.jitter_prob = spec.grayscale_prob = spec.blur_prob = spec.solarize_prob = 0.5;
    spec.brightness = spec.contrast = spec.saturation = 0.4;
    spec.hue = 0.2;
    bagssl::ViewOptions view;
    view.out_h = view.out_w = kSide;
    options.augments = {spec, spec};
    options.views = {view, view};
    options.threads = threads;
    options.batches_ahead = kBatchesAhead;
    options.skip_bad = true;
    options.max_pixels = 100'000'000;

    std::vector<int64_t> subset(source->size());
    std::iota(subset.begin(), subset.end(), 0);
    rows = subset;
    for (int64_t end = kBatchSize; end <= source->size(); end += kBatchSize) ends.push_back(end);
    std::vector<void*> slots;
    for (int i = 0; i < kBatchesAhead + bagssl::kHeldBatches; ++i) {
      memory.emplace_back(kPatches * kBatchSize * kPatchBytes);
      slots.push_back(memory.back().data());
    }
    // What is not a JPEG gets a gray picture: the callback's path, from every thread.
    const auto fallback = [](const uint8_t*, size_t, int64_t) {
      bagssl::DecodedImage image;
      image.height = image.width = 40;
      image.pixels.assign(40 * 40 * 3, 128);
      return image;
    };
    loader = std::make_unique<Loader>(source, options, slots, subset, fallback);
  }

  void start() { loader->start({1, rows, ends}, 0); }

  Loader::Status next(Batch* batch) {
    Loader::Status status;
    while ((status = loader->next(50, batch)) == Loader::Status::kWaiting) {
    }
    return status;
  }

  std::vector<std::vector<char>> memory;
  std::vector<int64_t> rows, ends;
  std::unique_ptr<Loader> loader;
};

std::vector<std::vector<char>> one_epoch(std::shared_ptr<const bagssl::Source> source,
                                         int threads) {
  Setup setup(source, threads);
  std::vector<std::vector<char>> batches;
  setup.start();
  Batch batch;
  while (setup.next(&batch) == Loader::Status::kReady) {
    require(batch.error.index < 0, batch.error.reason.c_str());
    batches.push_back(setup.memory[batch.slot]);
  }
  require(!setup.loader->skipped().empty(), "bad images are listed");
  return batches;
}

}  // namespace

int main(int argc, char** argv) {
  require(argc == 2, "usage: sanitize_driver SHARD.tar");
  const std::shared_ptr<const bagssl::Source> source = open_shard(argv[1], 160);
  require(source->size() >= 2 * kBatchSize, "a shard of at least 32 images");

  const std::vector<std::vector<char>> expected = one_epoch(source, 1);
  for (int threads : {2, 7}) {
    require(one_epoch(source, threads) == expected, "the same bags by any number of threads");
  }
  // Left after any number of batches, begun again, dropped while at work.
  for (int taken = 0; taken < 6; ++taken) {
    Setup setup(source, 3);
    Batch batch;
    setup.start();
    for (int i = 0; i < taken; ++i) setup.next(&batch);
    if (taken % 2 == 0) setup.loader->stop();
    if (taken % 3 == 0) setup.start();
  }
  bagssl::ThreadPool pool(4);
  std::vector<int64_t> squares(1000);
  for (int round = 0; round < 20; ++round) {
    pool.parallel_for(1000, [&](int, int64_t i) { squares[i] = i * i; });
    require(squares[999] == 999 * 999, "every item of a loop is done");
    try {
      pool.parallel_for(1000, [&](int, int64_t i) {
        if (i == 500) throw std::runtime_error("on purpose");
      });
      require(false, "the exception of a loop arrives");
    } catch (const std::runtime_error&) {
    }
  }
  std::puts("sanitize_driver: good");
  return 0;
}
