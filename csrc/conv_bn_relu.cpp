#include "conv_bn_relu.h"

#include <algorithm>
#include <vector>

#include "channel_moments.h"
#include "conv_bn_relu_pack.h"
#include "winograd.h"

namespace bagssl {
namespace {

/// About how many floats of x the first `rows` rows of outputs read.
int64_t read_before(const ConvGeometry& s, int64_t rows) {
  return s.height * s.width * s.channels * rows / (s.out_height * s.out_width);
}

}  // namespace

void conv_forward(const DeferredMaps& x, const float* weight, const KernelStrides& strides,
                  const ConvGeometry& given, float* y, float* mean, float* var, ThreadPool& pool) {
  if (winograd_serves(given)) {
    return winograd_forward(x, weight, strides, given, y, mean, var, pool);
  }
  const ConvLoops& loops = conv_loops();
  const ConvGeometry s = as_pixels(given);
  const int64_t rows = s.rows(), steps = s.steps(), channels = s.out_channels;
  if (rows == 0) return;
  const int64_t columns = round_up(channels, loops.panel);
  float* panels = weight_memory().take(columns * steps);
  pack_weight(weight, strides, s, panels, pool);
  const PaddedReader reader(x, s.channels);
  const float* end = x.y + s.n * s.height * s.width * s.channels;

  const int64_t at_a_time = chunk_rows(steps), chunks = ceil_div(rows, at_a_time);
  const int64_t groups = std::min(chunks, kMostGroups);
  std::vector<ChannelMoments> moments(mean ? groups : 0, ChannelMoments(channels));
  pool.parallel_for(groups, [&](int, int64_t group) {
    Pieces pieces(chunk_memory().take(packed_floats(at_a_time, steps) + 2 * (columns + kLine)));
    const Packed a = pieces.packed(at_a_time, steps);
    const std::vector<Run> runs = runs_of(s, !x.scale, a.block);
    float *part_mean = pieces.take(columns), *squares = pieces.take(columns);
    const int64_t last = part_begin(group + 1, groups, chunks);
    for (int64_t chunk = part_begin(group, groups, chunks); chunk < last; ++chunk) {
      const int64_t first = chunk * at_a_time, count = std::min(at_a_time, rows - first);
      loops.pack_pixels({x.y, end, first, count, runs.data(), int64_t(runs.size())}, s,
                        reader.get(), a);
      std::fill_n(part_mean, columns, 0.0f);
      std::fill_n(squares, columns, 0.0f);
      Ahead ahead;
      if (chunk + 1 < last) {
        ahead.add(x.y + read_before(s, first + count), read_before(s, count));
        ahead.add(y + (first + count) * channels, count * channels);
      }
      loops.forward({a, count, steps, panels, y + first * channels, channels,
                     mean ? part_mean : nullptr, squares, &ahead});
      if (mean) moments[group].add(part_mean, squares, static_cast<double>(count));
    }
  });
  if (!mean) return;
  for (int64_t group = 1; group < groups; ++group) {
    moments[0].add(moments[group]);
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = static_cast<float>(moments[0].mean[c]);
    var[c] = static_cast<float>(moments[0].squares[c] / static_cast<double>(rows));
  }
}

}  // namespace bagssl
