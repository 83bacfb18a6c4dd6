// The C++ data path without Python, for sanitizers: every thread, every way to end, bad images.
//   sanitize_driver SHARD.tar
// Exits 0 if the loader gives the same bags by any number of threads.

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "bag_pool.h"
#include "file.h"
#include "loader.h"
#include "patch_rows.h"
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
  const bagssl::File file(path);
  bagssl::TarIndex index = bagssl::index_tar(
      [&](int64_t offset, size_t size, uint8_t* out) { file.read(offset, size, out); },
      file.size());
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

    std::vector<int64_t> subset(source->size());
    std::iota(subset.begin(), subset.end(), 0);
    rows = subset;
    for (int64_t end = kBatchSize; end <= source->size(); end += kBatchSize) ends.push_back(end);
    std::vector<bagssl::Memory> slots;
    for (int i = 0; i < kBatchesAhead + bagssl::kHeldBatches; ++i) {
      memory.emplace_back(kPatches * kBatchSize * kPatchBytes);
      slots.push_back({memory.back().data(), static_cast<int64_t>(memory.back().size()), nullptr});
    }
    // What is not a JPEG gets a gray picture: the callback's path, from every thread.
    const auto fallback = [](const uint8_t*, size_t, int64_t, bagssl::ByteBuffer& pixels) {
      std::memset(pixels.take(40 * 40 * 3), 128, 40 * 40 * 3);
      return bagssl::ImageSize{40, 40};
    };
    loader = std::make_shared<Loader>(source, options, slots, subset, fallback);
  }
  ~Setup() { stop(); }

  int64_t start() {
    int64_t started;
    while ((started = loader->start({1, rows, ends}, 0, 50)) < 0) {
    }
    return started;
  }

  Loader::Status next(int64_t run, Batch* batch) {
    Loader::Status status;
    while ((status = loader->next(run, 50, batch)) == Loader::Status::kWaiting) {
    }
    return status;
  }

  void stop() {
    while (!loader->stop(-1, 50)) {
    }
  }

  std::vector<std::vector<uint8_t>> memory;
  std::vector<int64_t> rows, ends;
  std::shared_ptr<Loader> loader;
};

std::vector<std::vector<uint8_t>> one_epoch(std::shared_ptr<const bagssl::Source> source,
                                         int threads) {
  Setup setup(source, threads);
  std::vector<std::vector<uint8_t>> batches;
  const int64_t run = setup.start();
  Batch batch;
  while (setup.next(run, &batch) == Loader::Status::kReady) {
    require(batch.error.index < 0, batch.error.reason.c_str());
    batches.push_back(setup.memory[batch.slot]);
  }
  require(!setup.loader->skipped().empty(), "bad images are listed");
  return batches;
}

/// Threads that take batches, begin epochs and stop them, all at once.
void share_one_loader(std::shared_ptr<const bagssl::Source> source) {
  Setup setup(source, 3);
  std::atomic<int64_t> run{setup.start()};
  std::atomic<bool> over{false};
  std::vector<std::thread> consumers;
  for (int i = 0; i < 3; ++i) {
    consumers.emplace_back([&] {
      Batch batch;
      while (!over) {
        const int64_t mine = run;
        if (setup.next(mine, &batch) != Loader::Status::kReady) std::this_thread::yield();
      }
    });
  }
  std::vector<std::thread> controllers;
  for (int i = 0; i < 2; ++i) {
    controllers.emplace_back([&, i] {
      for (int round = 0; round < 20; ++round) {
        std::this_thread::sleep_for(std::chrono::milliseconds(3 * (round % 4)));
        if ((round + i) % 3 == 0) setup.stop();
        run = setup.start();
        setup.loader->skipped();
      }
    });
  }
  for (std::thread& thread : controllers) thread.join();
  over = true;
  for (std::thread& thread : consumers) thread.join();
}

/// Bags, patch rows and maps by a pool whose threads write next to each other.
void ops_under_several_threads() {
  bagssl::ThreadPool pool(4);
  constexpr int64_t kP = 5, kB = 7, kD = 33;
  std::vector<float> x(kP * kB * kD), mean(kB * kD), distance(kB), norm(kP * kB), dot(kP * kB);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 13) - 6.0f;
  bagssl::bag_pool(bagssl::Bags<float>{x.data(), kP, kB, kD, kB * kD, kD},
                   bagssl::BagStatistics<float>{mean.data(), distance.data(), norm.data(),
                                                dot.data()},
                   pool);
  std::vector<uint8_t> pixels(64 * 64 * 3, 7);
  std::vector<int64_t> offsets(50);
  for (size_t i = 0; i < offsets.size(); ++i) offsets[i] = static_cast<int64_t>(i) * 60;
  std::vector<float> rows(offsets.size() * 8 * 24);
  bagssl::patch_rows(bagssl::PatchRows{pixels.data(), offsets.data(), 50, 8, 24, 192, 1},
                     rows.data(), pool);
}

}  // namespace

int main(int argc, char** argv) {
  require(argc == 2, "usage: sanitize_driver SHARD.tar");
  const std::shared_ptr<const bagssl::Source> source = open_shard(argv[1], 160);
  require(source->size() >= 2 * kBatchSize, "a shard of at least 32 images");

  const std::vector<std::vector<uint8_t>> expected = one_epoch(source, 1);
  for (int threads : {2, 7}) {
    require(one_epoch(source, threads) == expected, "the same bags by any number of threads");
  }
  // Left after any number of batches, begun again, dropped while at work.
  for (int taken = 0; taken < 6; ++taken) {
    Setup setup(source, 3);
    Batch batch;
    const int64_t run = setup.start();
    for (int i = 0; i < taken; ++i) setup.next(run, &batch);
    if (taken % 2 == 0) setup.stop();
    if (taken % 3 == 0) setup.start();
  }
  share_one_loader(source);
  ops_under_several_threads();
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
