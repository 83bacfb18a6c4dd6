#include <algorithm>

#include "winograd.h"
#include "winograd_ops.h"

namespace bagssl {
namespace {

constexpr int64_t kTilesAtATime = 48;     // of a chunk: each reads and writes all sums
constexpr int64_t kRange = 128;           // channels, in and out, whose sums an item owns
constexpr int64_t kMostSums = 16;         // copies of the sums, each of
constexpr int64_t kGroupTiles = 96;       // at least so many tiles; all have at most
constexpr int64_t kSumFloats = 16 << 20;  // so many numbers

constexpr int64_t kTogether = 16;  // channels whose taps are written together

thread_local Workspace sum_memory;

/// dweight is cut into ranges of channels, and the sum over tiles into groups.
struct WeightSums {
  const WinogradLoops& loops;
  const ConvGeometry& s;

  int64_t down() const { return ceil_div(s.out_height, kTile); }
  int64_t across() const { return ceil_div(s.out_width, kTile); }
  int64_t tiles() const { return s.n * down() * across(); }
  int64_t in_ranges() const { return ceil_div(s.channels, kRange); }
  int64_t out_ranges() const { return ceil_div(s.out_channels, kRange); }
  int64_t ranges() const { return in_ranges() * out_ranges(); }
  /// Rows of a panel of sums, each block's padded to whole tiles.
  int64_t row(int64_t c) const {
    return c / kPointBlock * round_up(kPointBlock, loops.tile_columns) + c % kPointBlock;
  }
  int64_t rows() const {
    return round_up(row(std::min(s.channels, kRange) - 1) + 1, loops.tile_columns);
  }
  /// Floats of one point of a range.
  int64_t step() const {
    return rows() * round_up(std::min(s.out_channels, kRange), loops.panel) + kLine;
  }
  int64_t group_floats() const { return ranges() * kPoints * step(); }
  int64_t chunks() const { return ceil_div(tiles(), kTilesAtATime); }
  int64_t groups() const {
    int64_t groups = 1;  // a power of two, as numbers of threads are
    while (groups < kMostSums && 2 * groups * kGroupTiles <= tiles() &&
           2 * groups * group_floats() <= kSumFloats) {
      groups *= 2;
    }
    return std::min(groups, chunks());
  }
};

/// dweight of one panel of output channels in a range, from the sums of all groups.
void write_taps(const WeightSums& all, int64_t range, int64_t panel_in_range, const float* sums,
                int64_t groups, const ConvResults& results) {
  const WinogradLoops& loops = all.loops;
  const KernelStrides& strides = results.dweight_strides;
  const int64_t panel = loops.panel, first_k = panel_in_range * panel;
  const int64_t first = range / all.out_ranges() * kRange;
  const int64_t k = range % all.out_ranges() * kRange + first_k;
  const int64_t end = std::min(all.s.channels, first + kRange);
  const int64_t lanes = std::min(panel, all.s.out_channels - k);
  for (int64_t begin = first; begin < end; begin += kTogether) {
    alignas(64) float taps[kTogether][9 * 2 * kMostLanes];
    const int64_t count = std::min(kTogether, end - begin);
    for (int64_t c = 0; c < count; ++c) {
      const float* points = sums + first_k * all.rows() + all.row(begin - first + c) * panel;
      loops.to_taps(points, all.step(), groups, all.group_floats(), taps[c]);
    }
    for (int64_t tap = 0; tap < 9; ++tap) {
      float* to = results.dweight + k * strides.out + begin * strides.in + tap / 3 * strides.row +
                  tap % 3 * strides.column;
      for (int64_t l = 0; l < lanes; ++l) {
        for (int64_t c = 0; c < count; ++c) {
          to[l * strides.out + c * strides.in] = taps[c][tap * panel + l];
        }
      }
    }
  }
}

}  // namespace

void winograd_weight(const ConvGradient& gradient, const DeferredMaps& x, const ConvGeometry& s,
                     const ConvResults& results, ThreadPool& pool) {
  const WeightSums all{winograd_loops(), s};
  const PaddedReader reader(x, s.channels);
  const GradientMap dy(gradient, s);
  const WinogradMaps x_maps{x.y,          s.height, s.width, s.channels,
                            reader.get(), nullptr,  nullptr, nullptr};
  const WinogradMaps dy_maps{
      gradient.dy, s.out_height, s.out_width, s.out_channels, {nullptr, nullptr, nullptr},
      gradient.y,  dy.slope(),   dy.offset()};
  const int64_t groups = all.groups(), ranges = all.ranges();
  const int64_t range_floats = kPoints * all.step();
  float* sums = groups == 1 ? nullptr : sum_memory.take(groups * all.group_floats());
  const int64_t floats = points_floats(kTilesAtATime, kRange);
  pool.parallel_for(groups * ranges, [&](int, int64_t item) {
    Pieces pieces(chunk_memory().take(2 * floats + range_floats + 3 * kLine));
    const Points inputs = points_at(pieces.take(floats), kTilesAtATime, kRange);
    const Points gradients = points_at(pieces.take(floats), kTilesAtATime, kRange);
    // A group that is the only one need not keep its sums.
    float* own = sums ? sums + item * range_floats : pieces.take(range_floats);
    std::fill_n(own, range_floats, 0.0f);
    const int64_t group = item / ranges, range = item % ranges;
    const int64_t c = range / all.out_ranges() * kRange, k = range % all.out_ranges() * kRange;
    const int64_t columns = std::min(kRange, s.channels - c);
    const int64_t channels = std::min(kRange, s.out_channels - k);
    const int64_t end = part_begin(group + 1, groups, all.chunks());
    for (int64_t chunk = part_begin(group, groups, all.chunks()); chunk < end; ++chunk) {
      const int64_t first = chunk * kTilesAtATime;
      const int64_t last = std::min(all.tiles(), first + kTilesAtATime);
      all.loops.from_windows(x_maps, {all.down(), all.across(), first, last, c, columns, s.padding},
                             inputs);
      all.loops.from_tiles(dy_maps, {all.down(), all.across(), first, last, k, channels, 0},
                           gradients);
      all.loops.weight(inputs, gradients, last - first, columns, channels, own, all.step(),
                       all.rows());
    }
    for (int64_t panel = 0; !sums && panel * all.loops.panel < channels; ++panel) {
      write_taps(all, range, panel, own, 1, results);
    }
  });
  if (!sums) return;
  const int64_t panels = ceil_div(std::min(s.out_channels, kRange), all.loops.panel);
  pool.parallel_for(ranges * panels, [&](int, int64_t item) {
    const int64_t range = item / panels, panel = item % panels;
    const int64_t k = range % all.out_ranges() * kRange + panel * all.loops.panel;
    if (k >= s.out_channels) return;
    write_taps(all, range, panel, sums + range * range_floats, groups, results);
  });
}

}  // namespace bagssl
