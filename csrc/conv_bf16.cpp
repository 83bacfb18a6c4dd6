#include <algorithm>
#include <vector>

#include "channel_moments.h"
#include "conv_bf16_pack.h"

namespace bagssl {
void conv_forward(const MapsOf<BFloat16>& x, const float* weight, const KernelStrides& strides,
                  const ConvGeometry& given, BFloat16* y, float* mean, float* var,
                  ThreadPool& pool) {
  const ConvLoops16& loops = conv_loops16();
  const ConvGeometry s = as_pixels(given);
  const int64_t steps = s.steps(), channels = s.out_channels, pixels = s.out_height * s.out_width;
  if (s.rows() == 0) return;
  const int64_t columns = round_up(channels, kPanel16);
  auto* panels =
      reinterpret_cast<BFloat16*>(weight_memory().take(columns * round_up(steps, kPanel16) / 2));
  pack_weight16(weight, strides, s, panels, pool);
  const PaddedReader reader(x, s.channels);

  const int64_t at_a_time = chunk_rows16(steps);
  const int64_t images = std::max<int64_t>(1, at_a_time / pixels), blocks = ceil_div(s.n, images);
  const int64_t groups = std::min(blocks, kMostGroups);
  std::vector<ChannelMoments> moments(mean ? groups : 0, ChannelMoments(channels));
  pool.parallel_for(groups, [&](int, int64_t group) {
    Pieces pieces(chunk_memory().take(packed_floats16(at_a_time, steps) +
                                      Activation16::floats(s, x, images) + 5 * (columns + kLine)));
    const Packed16 a = packed16(pieces, at_a_time, steps);
    Activation16 activation(s, x, reader.get(), images, pieces);
    float *sums = pieces.take(columns), *squares = pieces.take(columns);
    float *center = pieces.take(columns), *part_mean = pieces.take(columns);
    bool centered = false;
    const int64_t last = part_begin(group + 1, groups, blocks);
    for (int64_t block = part_begin(group, groups, blocks); block < last; ++block) {
      const int64_t first_image = block * images, end = std::min(s.n, first_image + images);
      activation.take(first_image, end);
      for (int64_t first = first_image * pixels; first < end * pixels; first += at_a_time) {
        const int64_t count = std::min(at_a_time, end * pixels - first);
        activation.pack(first, count, a);
        std::fill_n(sums, columns, 0.0f);
        std::fill_n(squares, columns, 0.0f);
        BFloat16* to = y + first * channels;
        loops.forward({a, count, steps, panels, to, channels, mean ? sums : nullptr, squares,
                       center, centered});
        centered = true;
        if (!mean) continue;
        // Sums of differences from a value near the mean lose little to rounding.
        ChannelMoments& all = moments[group];
        for (int64_t c = 0; c < channels; ++c) {
          const float d = sums[c] / static_cast<float>(count);
          part_mean[c] = center[c] + d;
          squares[c] = std::max(0.0f, squares[c] - d * sums[c]);
        }
        all.add(part_mean, squares, static_cast<double>(count));
        for (int64_t c = 0; c < channels; ++c) center[c] = static_cast<float>(all.mean[c]);
      }
    }
  });
  if (!mean) return;
  for (int64_t group = 1; group < groups; ++group) moments[0].add(moments[group]);
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = static_cast<float>(moments[0].mean[c]);
    var[c] = static_cast<float>(moments[0].squares[c] / static_cast<double>(s.rows()));
  }
}

}  // namespace bagssl
