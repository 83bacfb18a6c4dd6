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
  const int64_t of_panel = panel_numbers16(steps);
  auto* panels =
      reinterpret_cast<BFloat16*>(weight_memory().take(columns / kPanel16 * of_panel / 2));
  pack_weight16(weight, strides, s, panels, pool);
  const PaddedReader reader(x, s.channels);

  const Blocks16 of_steps(steps);
  const int64_t tiles = of_steps.count() > 1 ? kForwardRows16 * columns : 0;
  const int64_t images = std::max<int64_t>(1, kForwardRows16 / pixels),
                blocks = ceil_div(s.n, images);
  const int64_t groups = std::min(blocks, kMostGroups);
  std::vector<ChannelMoments> moments(mean ? groups : 0, ChannelMoments(channels));
  pool.parallel_for(groups, [&](int, int64_t group) {
    Pieces pieces(chunk_memory().take(packed_floats16(kForwardRows16) + tiles +
                                      Activation16::floats(s, x, images) + 4 * columns +
                                      8 * kLine));
    BFloat16* a = take16(pieces, packed_floats16(kForwardRows16));
    float* sums_of_blocks = tiles ? pieces.take(tiles) : nullptr;
    Activation16 activation(s, x, reader.get(), images, pieces);
    float *sums = pieces.take(columns), *squares = pieces.take(columns);
    float *center = pieces.take(columns), *part_mean = pieces.take(columns);
    bool centered = false;
    const int64_t last = part_begin(group + 1, groups, blocks);
    for (int64_t block = part_begin(group, groups, blocks); block < last; ++block) {
      const int64_t first_image = block * images, end = std::min(s.n, first_image + images);
      activation.take(first_image, end);
      for (int64_t first = first_image * pixels; first < end * pixels; first += kForwardRows16) {
        const int64_t count = std::min(kForwardRows16, end * pixels - first);
        std::fill_n(sums, columns, 0.0f);
        std::fill_n(squares, columns, 0.0f);
        for (int64_t k = 0; k < of_steps.count(); ++k) {
          activation.pack(first, count, k, a);
          loops.forward(
              {a, count, of_steps.length_of(k), panels + of_steps.first(k) * kPanel16, of_panel,
               columns, sums_of_blocks, k == 0, k + 1 == of_steps.count()},
              {y + first * channels, channels, mean ? sums : nullptr, squares, center, centered});
        }
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
