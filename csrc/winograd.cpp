#include "winograd.h"

#include <algorithm>
#include <vector>

#include "channel_moments.h"
#include "winograd_ops.h"

#define BAGSSL_BODY "winograd_body.h"
#include "simd_levels.h"

namespace bagssl {
namespace {

constexpr int64_t kTilesAtATime = 48;    // what they become, and their products, fit a cache
constexpr int64_t kMostTiles = 72;       // as one chunk, where there are no more
constexpr int64_t kSplitChannels = 128;  // of outputs: where tiles are few, threads share them

/// Taps of input channels [c, c + count) to `lanes` output channels from `k` on, [count][9][panel].
void gather_taps(const float* weight, const KernelStrides& strides, int64_t k, int64_t lanes,
                 int64_t c, int64_t count, int64_t panel, float* taps) {
  for (int64_t tap = 0; tap < 9; ++tap) {
    const float* from = weight + k * strides.out + c * strides.in + tap / 3 * strides.row +
                        tap % 3 * strides.column;
    for (int64_t i = 0; i < count; ++i) {
      float* to = taps + (i * 9 + tap) * panel;
      for (int64_t l = 0; l < panel; ++l) {
        to[l] = l < lanes ? from[i * strides.in + l * strides.out] : 0.0f;
      }
    }
  }
}

/// The weights of a convolution, before they are transformed.
struct Weights {
  const float* taps;
  KernelStrides strides;
  int64_t in_channels, out_channels;

  int64_t panel_floats() const { return kPoints * in_channels * winograd_loops().panel; }

  /// The panel [kPoints][in_channels][panel] of output channels from `k` on.
  void transform(int64_t k, float* out) const {
    constexpr int64_t kTogether = 16;
    const WinogradLoops& loops = winograd_loops();
    const int64_t panel = loops.panel, lanes = std::min(panel, out_channels - k);
    for (int64_t c = 0; c < in_channels; c += kTogether) {
      alignas(64) float of_channels[kTogether * 9 * 2 * kMostLanes];
      const int64_t count = std::min(kTogether, in_channels - c);
      gather_taps(taps, strides, k, lanes, c, count, panel, of_channels);
      for (int64_t i = 0; i < count; ++i) {
        loops.from_taps(of_channels + i * 9 * panel, in_channels * panel, out + (c + i) * panel);
      }
    }
  }
};

/// A convolution of `maps` to maps of out_height x out_width, cut into chunks of tiles and, where
/// these are few, ranges of output channels.
struct Convolution {
  const WinogradMaps& maps;
  int64_t n, out_height, out_width, border;
  Weights weights;
  ThreadPool& pool;

  int64_t down() const { return ceil_div(out_height, kTile); }
  int64_t across() const { return ceil_div(out_width, kTile); }
  int64_t tiles() const { return n * down() * across(); }
  int64_t chunk() const { return tiles() <= kMostTiles ? tiles() : kTilesAtATime; }
  int64_t chunks() const { return ceil_div(tiles(), chunk()); }
  int64_t groups() const { return std::min(chunks(), kMostGroups); }
  int64_t ranges() const {
    return groups() < 16 ? ceil_div(weights.out_channels, kSplitChannels) : 1;
  }
  int64_t range_begin(int64_t range) const {
    const int64_t channels = weights.out_channels;
    return ranges() == 1 ? range * channels : std::min(range * kSplitChannels, channels);
  }

  /// write(item, panel of products) for all panels of outputs; item = group * ranges() + range.
  template <typename Write>
  void run(Write write) const {
    const WinogradLoops& loops = winograd_loops();
    const int64_t channels = maps.channels, panel = loops.panel, group_count = groups();
    const int64_t panels = ceil_div(weights.out_channels, panel), floats = weights.panel_floats();
    const int64_t in_floats = points_floats(chunk(), channels);
    const int64_t out_step = odd_lines((chunk() + kMostTileRows) * panel);
    // Read once, a panel of weights is transformed where it is used: wide ones would go to memory.
    const bool once = chunks() == 1;
    float* transformed = once ? nullptr : weight_memory().take(panels * floats);
    pool.parallel_for(once ? 0 : panels, [&](int, int64_t item) {
      weights.transform(item * panel, transformed + item * floats);
    });
    pool.parallel_for(group_count * ranges(), [&](int, int64_t item) {
      const int64_t own_floats = once ? floats : 0;
      Pieces pieces(chunk_memory().take(in_floats + kPoints * out_step + own_floats + 3 * kLine));
      const Points points = points_at(pieces.take(in_floats), chunk(), channels);
      float *products = pieces.take(kPoints * out_step), *own = pieces.take(own_floats);
      const int64_t group = item / ranges(), range = item % ranges();
      const int64_t end = part_begin(group + 1, group_count, chunks());
      for (int64_t at = part_begin(group, group_count, chunks()); at < end; ++at) {
        TileRange part{down(), across(), at * chunk(), 0, 0, channels, border};
        part.last = std::min(tiles(), part.first + chunk());
        loops.from_windows(maps, part, points);
        part.border = 0;
        const int64_t rows = part.last - part.first, last = range_begin(range + 1);
        for (int64_t k = range_begin(range); k < last; k += panel) {
          if (once) weights.transform(k, own);
          const float* weight = once ? own : transformed + k / panel * floats;
          const float* weights_end = once ? own + floats : transformed + panels * floats;
          loops.products({points, rows, channels, weight, weights_end, products, out_step});
          part.first_channel = k;
          part.channels = std::min(panel, weights.out_channels - k);
          write(item, TileOutputs{products, out_step, part, out_height, out_width,
                                  weights.out_channels, nullptr});
        }
      }
    });
  }
};

}  // namespace

const WinogradLoops& winograd_loops() { return *BAGSSL_PICK(kLoops); }

// With fewer channels the transforms cost more than the products save, with fewer tiles those of
// the weights do; and tiles that stick out far of their map (2x2, 5x5) are mostly zeros.
bool winograd_serves(const ConvGeometry& s) {
  if (s.kernel_height != 3 || s.kernel_width != 3 || s.stride != 1 || s.padding > 2) return false;
  const int64_t tiles = s.n * ceil_div(s.out_height, kTile) * ceil_div(s.out_width, kTile);
  return std::min(s.channels, s.out_channels) >= 32 && tiles >= 32 &&
         9 * s.rows() >= 2 * kPoints * tiles;
}

void winograd_forward(const DeferredMaps& x, const float* weight, const KernelStrides& strides,
                      const ConvGeometry& s, float* y, float* mean, float* var, ThreadPool& pool) {
  const WinogradLoops& loops = winograd_loops();
  const int64_t channels = s.out_channels, padded = round_up(channels, loops.panel);
  const PaddedReader reader(x, s.channels);
  const WinogradMaps maps{x.y,          s.height, s.width, s.channels,
                          reader.get(), nullptr,  nullptr, nullptr};
  const Convolution all{maps,        s.n,       s.out_height,
                        s.out_width, s.padding, {weight, strides, s.channels, channels},
                        pool};
  // One item's channels, and the pixels of each.
  std::vector<ChannelMoments> moments(mean ? all.groups() * padded / loops.panel : 0,
                                      ChannelMoments(loops.panel));
  all.run([&](int64_t item, TileOutputs outputs) {
    alignas(64) float part_mean[2 * kMostLanes], squares[2 * kMostLanes];
    outputs.y = y;
    loops.to_outputs(outputs, mean ? part_mean : nullptr, squares);
    if (!mean) return;
    int64_t pixels = 0;
    for (int64_t tile = outputs.tiles.first; tile < outputs.tiles.last; ++tile) {
      const int64_t row = tile / all.across() % all.down(), column = tile % all.across();
      pixels += std::min<int64_t>(kTile, s.out_height - row * kTile) *
                std::min<int64_t>(kTile, s.out_width - column * kTile);
    }
    const int64_t panel = outputs.tiles.first_channel / loops.panel;
    moments[item / all.ranges() * (padded / loops.panel) + panel].add(part_mean, squares,
                                                                      static_cast<double>(pixels));
  });
  for (int64_t c = 0; mean && c < channels; c += loops.panel) {
    const int64_t panel = c / loops.panel;
    for (int64_t group = 1; group < all.groups(); ++group) {
      moments[panel].add(moments[group * (padded / loops.panel) + panel]);
    }
    for (int64_t j = 0; j < std::min(loops.panel, channels - c); ++j) {
      mean[c + j] = static_cast<float>(moments[panel].mean[j]);
      var[c + j] = static_cast<float>(moments[panel].squares[j] / static_cast<double>(s.rows()));
    }
  }
}

void winograd_data(const ConvGradient& gradient, const DeferredMaps& x, const float* weight,
                   const KernelStrides& strides, const ConvGeometry& s, const ConvResults& results,
                   ThreadPool& pool) {
  const WinogradLoops& loops = winograd_loops();
  const int64_t channels = s.channels, padded = round_up(channels, loops.panel);
  // The taps turned around, and the channels exchanged.
  const Weights turned{weight + 2 * (strides.row + strides.column),
                       {strides.in, strides.out, -strides.row, -strides.column},
                       s.out_channels,
                       channels};
  const PaddedReader reader(x, channels);
  const GradientMap dy(gradient, s);
  const WinogradMaps maps{
      gradient.dy, s.out_height, s.out_width, s.out_channels, {nullptr, nullptr, nullptr},
      gradient.y,  dy.slope(),   dy.offset()};
  const Convolution all{maps, s.n, s.height, s.width, 2 - s.padding, turned, pool};
  std::vector<double> sums(x.scale ? all.groups() * 2 * padded : 0);
  all.run([&](int64_t item, TileOutputs outputs) {
    alignas(64) float dscale[2 * kMostLanes] = {}, dshift[2 * kMostLanes] = {};
    outputs.y = results.dx;
    loops.to_gradients(outputs, x.y, reader.get(), dscale, dshift);
    if (!x.scale) return;
    double* of_group = sums.data() + item / all.ranges() * 2 * padded + outputs.tiles.first_channel;
    for (int64_t j = 0; j < loops.panel; ++j) {
      of_group[j] += dscale[j];
      of_group[padded + j] += dshift[j];
    }
  });
  if (x.scale)
    join_sums(sums.data(), all.groups(), padded, channels, results.dscale, results.dshift);
}

}  // namespace bagssl
