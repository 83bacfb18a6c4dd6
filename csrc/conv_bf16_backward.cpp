#include <algorithm>
#include <vector>

#include "conv_bf16_pack.h"

namespace bagssl {
namespace {

constexpr int64_t kWeightGroups = 16;        // each with its own dweight, of which
constexpr int64_t kGroupRows = 1024;         // each is the sum of at least so many rows, and
constexpr int64_t kWeightFloats = 16 << 20;  // all have at most so many numbers

/// What all threads of one backward pass read.
struct Backward {
  const ConvLoops16& loops;
  ConvGeometry s;
  const MapsOf<BFloat16>& x;
  const GradientOf<BFloat16>& gradient;
  Reader reader;
  const GradientMap dy;
  const BFloat16* panels;  // of the transposed weights; null: no dx
  BFloat16* dx;
  bool of_weight;

  int64_t pixels() const { return s.out_height * s.out_width; }
  int64_t padded() const { return round_up(s.channels, kPanel16); }
  int64_t map_width() const { return s.width + 2 * s.padding; }
  int64_t map_floats() const { return (s.height + 2 * s.padding) * map_width() * padded(); }
  bool scattered() const { return panels && !s.pointwise(); }
  int64_t at_a_time() const { return chunk_rows16(std::max(s.steps(), s.out_channels)); }
  /// Maps that are worked on together.
  int64_t images() const { return std::max<int64_t>(1, at_a_time() / pixels()); }
  /// Floats from row to row of dweight: not a power of two, which would meet in the cache.
  int64_t weight_step() const { return round_up(s.steps(), kPanel16) + kLine; }
  int64_t weight_floats() const {
    return of_weight ? round_up(s.out_channels, kPanel16) * weight_step() : 0;
  }
  int64_t groups() const {
    const int64_t blocks = ceil_div(s.n, images());
    if (!of_weight) return std::min(blocks, kMostGroups);
    int64_t groups = 1;  // a power of two, as numbers of threads are
    while (groups < kWeightGroups && 2 * groups * kGroupRows <= s.rows() &&
           2 * groups * weight_floats() <= kWeightFloats) {
      groups *= 2;
    }
    return std::min(groups, blocks);
  }
  int64_t floats() const {
    const int64_t rows = at_a_time();
    return 2 * packed_floats16(rows, s.steps()) + packed_floats16(rows / 2, 2 * s.steps()) +
           packed_floats16(rows, s.out_channels) + packed_floats16(s.out_channels, rows) +
           Activation16::floats(s, x, images()) + 2 * padded() +
           (scattered() ? images() * map_floats() : 0) + 8 * kLine;
  }
};

/// One thread's memory for a group of images, and the passes over it.
class BackwardPass {
 public:
  BackwardPass(const Backward& all, Pieces pieces, float* dweight)
      : all_(all),
        a_(packed16(pieces, all.at_a_time(), all.s.steps())),
        pairs_(packed16(pieces, all.at_a_time() / 2, 2 * all.s.steps())),
        dy_(packed16(pieces, all.at_a_time(), all.s.out_channels)),
        turned_(packed16(pieces, all.s.out_channels, all.at_a_time())),
        activation_(all.s, all.x, all.reader, all.images(), pieces),
        sums_(pieces.take(2 * all.padded())),
        maps_(all.scattered() ? pieces.take(all.images() * all.map_floats()) : nullptr),
        dweight_(dweight),
        rows_(all.at_a_time()) {
    const ConvGeometry& s = all.s;
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      const int64_t pixel = tap / s.kernel_width * all.map_width() + tap % s.kernel_width;
      for (int64_t c = 0; c < all.padded(); c += kPanel16) {
        panels_.push_back(pixel * all.padded() + c);
      }
    }
  }

  /// Images [first, last); adds to the sums over pixels, [2][channels] if dx is computed.
  void run(int64_t first, int64_t last, double* sums) {
    const ConvGeometry& s = all_.s;
    std::fill_n(sums_, 2 * all_.padded(), 0.0f);
    if (maps_) std::fill_n(maps_, (last - first) * all_.map_floats(), 0.0f);
    if (all_.of_weight) activation_.take(first, last);
    const int64_t end = last * all_.pixels();
    for (int64_t row = first * all_.pixels(); row < end; row += all_.at_a_time()) {
      run_rows(row, std::min(all_.at_a_time(), end - row), first);
    }
    if (maps_) mask_maps(first, last);
    if (!all_.panels || !all_.reader.scale) return;
    for (int64_t c = 0; c < s.channels; ++c) {
      sums[c] += sums_[c];
      sums[s.channels + c] += sums_[all_.padded() + c];
    }
  }

 private:
  void run_rows(int64_t first, int64_t rows, int64_t first_image) {
    const ConvGeometry& s = all_.s;
    const ConvLoops16& loops = all_.loops;
    const int64_t at = first * s.out_channels;
    loops.pack_gradient({all_.gradient.dy + at, all_.dy.slope() ? all_.gradient.y + at : nullptr,
                         all_.dy.slope(), all_.dy.offset(), rows, s.out_channels},
                        dy_);
    if (all_.of_weight) {
      activation_.pack(first, rows, a_);
      loops.interleave(a_, rows, s.steps(), pairs_);
      loops.transpose(dy_, rows, s.out_channels, turned_);
      loops.weight(turned_, pairs_, rows, s.steps(), s.out_channels, dweight_, all_.weight_step());
    }
    if (!all_.panels) return;
    const DataChunk16 chunk{dy_, rows, s.out_channels, all_.panels, s.taps() * all_.padded()};
    if (!maps_) return loops.data(chunk, mask_of(first * s.channels, rows, nullptr));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t pixel = first + r, image = pixel / all_.pixels();
      const int64_t y = pixel / s.out_width % s.out_height, x = pixel % s.out_width;
      rows_[r] = (image - first_image) * all_.map_floats() +
                 (y * all_.map_width() + x) * s.stride * all_.padded();
    }
    loops.data_scattered(chunk, {maps_, rows_.data(), panels_.data(), all_.padded() / kPanel16});
  }

  /// The pixels of x from number `at` on, whose gradients are those in `g`.
  MaskChunk16 mask_of(int64_t at, int64_t pixels, const float* g) const {
    return {g,
            all_.padded(),
            all_.x.y + at,
            all_.dx + at,
            pixels,
            all_.s.channels,
            pixels * all_.s.channels,
            all_.reader,
            sums_,
            sums_ + all_.padded()};
  }

  void mask_maps(int64_t first, int64_t last) {
    const ConvGeometry& s = all_.s;
    for (int64_t image = first; image < last; ++image) {
      const float* map = maps_ + (image - first) * all_.map_floats();
      for (int64_t y = 0; y < s.height; ++y) {
        const int64_t inside = (y + s.padding) * all_.map_width() + s.padding;
        const int64_t at = (image * s.height + y) * s.width * s.channels;
        all_.loops.mask(mask_of(at, s.width, map + inside * all_.padded()));
      }
    }
  }

  const Backward& all_;
  Packed16 a_, pairs_, dy_, turned_;
  Activation16 activation_;
  float *sums_, *maps_, *dweight_;
  std::vector<int64_t> panels_, rows_;
};

thread_local Workspace sums_of_groups;

/// dweight as the sum of what the groups found.
void join_weights(const Backward& all, const float* groups_dweight, int64_t groups, float* dweight,
                  const KernelStrides& strides, ThreadPool& pool) {
  const ConvGeometry& s = all.s;
  pool.parallel_for(s.out_channels, [&](int, int64_t n) {
    for (int64_t panel = 0; panel < s.steps(); panel += kPanel16) {
      float sum[kPanel16] = {};
      const float* from = groups_dweight + n * all.weight_step() + panel;
      for (int64_t group = 0; group < groups; ++group, from += all.weight_floats()) {
        for (int64_t j = 0; j < kPanel16; ++j) sum[j] += from[j];
      }
      for (int64_t j = 0; j < kPanel16; ++j) {
        const int64_t k = panel + all.loops.order[j], tap = k / s.channels;
        if (k >= s.steps()) continue;
        dweight[n * strides.out + k % s.channels * strides.in + tap / s.kernel_width * strides.row +
                tap % s.kernel_width * strides.column] = sum[j];
      }
    }
  });
}

}  // namespace

void conv_backward(const GradientOf<BFloat16>& gradient, const MapsOf<BFloat16>& x,
                   const float* weight, const KernelStrides& strides, const ConvGeometry& given,
                   const ResultsOf<BFloat16>& results, ThreadPool& pool) {
  const PaddedReader reader(x, given.channels);
  Backward all{conv_loops16(), as_pixels(given), x,
               gradient,       reader.get(),     {gradient, given},
               nullptr,        results.dx,       results.dweight != nullptr};
  const ConvGeometry& s = all.s;
  if (results.dx) {
    auto* panels = reinterpret_cast<BFloat16*>(
        weight_memory().take(s.taps() * all.padded() * round_up(s.out_channels, kPanel16) / 2));
    pack_transposed16(weight, strides, s, panels, pool);
    all.panels = panels;
  }
  const int64_t groups = all.groups(), blocks = ceil_div(s.n, all.images());
  float* dweights = sums_of_groups.take(groups * all.weight_floats());
  std::vector<double> sums(groups * 2 * s.channels);
  pool.parallel_for(groups, [&](int, int64_t group) {
    float* dweight = dweights + group * all.weight_floats();
    std::fill_n(dweight, all.weight_floats(), 0.0f);
    BackwardPass pass(all, Pieces(chunk_memory().take(all.floats())), dweight);
    const int64_t last = part_begin(group + 1, groups, blocks);
    for (int64_t block = part_begin(group, groups, blocks); block < last; ++block) {
      pass.run(block * all.images(), std::min(s.n, (block + 1) * all.images()),
               sums.data() + group * 2 * s.channels);
    }
  });
  if (results.dweight) {
    join_weights(all, dweights, groups, results.dweight, results.dweight_strides, pool);
  }
  if (results.dx && x.scale) {
    join_sums(sums.data(), groups, s.channels, s.channels, results.dscale, results.dshift);
  }
}

}  // namespace bagssl
