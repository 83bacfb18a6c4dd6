#include <algorithm>
#include <vector>

#include "conv_bn_relu_pack.h"
#include "winograd.h"

namespace bagssl {
namespace {

constexpr int64_t kWeightGroups = 16;        // each with its own dweight, of which
constexpr int64_t kGroupRows = 512;          // each is the sum of at least so many rows, and
constexpr int64_t kWeightFloats = 16 << 20;  // all have at most so many numbers

/// What all threads of one backward pass read.
struct Backward {
  const ConvLoops& loops;
  ConvGeometry s;
  const DeferredMaps& x;
  const ConvGradient& gradient;
  Reader reader;
  const GradientMap dy;
  const float* panels;  // of the transposed weights; null: no dx
  float* dx;
  bool of_weight;

  int64_t padded() const { return round_up(s.channels, loops.lanes); }
  int64_t map_height() const { return s.height + 2 * s.padding; }
  int64_t map_width() const { return s.width + 2 * s.padding; }
  int64_t map_floats() const { return map_height() * map_width() * padded(); }
  int64_t out_pixels() const { return s.out_height * s.out_width; }
  /// Maps that are worked on together.
  int64_t images() const { return ceil_div(kChunkRows, out_pixels()); }
  int64_t rows_at_a_time() const { return chunk_rows(std::max(s.steps(), s.out_channels)); }
  /// Rows of a panel of dweight, each block's padded to whole tiles.
  int64_t weight_row(int64_t k) const {
    return k / kBlock * round_up(kBlock, loops.tile_columns) + k % kBlock;
  }
  int64_t weight_rows() const {
    return round_up(weight_row(s.steps() - 1) + 1, loops.tile_columns);
  }
  int64_t weight_floats() const {
    return of_weight ? weight_rows() * round_up(s.out_channels, loops.panel) : 0;
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
};

/// One thread's memory for a group of images, and the passes over it.
class BackwardPass {
 public:
  BackwardPass(const Backward& all, float* memory, float* dweight)
      : all_(all),
        dweight_(dweight),
        scatter_columns_(all.s.taps() * all.padded() / all.loops.lanes),
        scatter_rows_(all.rows_at_a_time()) {
    Pieces pieces(memory);
    a_ = pieces.packed(all.rows_at_a_time(), all.s.steps());
    runs_ = runs_of(all.s, !all.x.scale, a_.block);
    dy_ = pieces.packed(all.rows_at_a_time(), all.s.out_channels);
    sums_ = pieces.take(2 * all.padded());
    map_ = pieces.take(scattered() ? all.images() * all.map_floats() : 0);
    for (size_t v = 0; v < scatter_columns_.size(); ++v) {
      const int64_t column = v * all.loops.lanes, tap = column / all.padded();
      scatter_columns_[v] =
          (tap / all.s.kernel_width * all.map_width() + tap % all.s.kernel_width) * all.padded() +
          column % all.padded();
    }
  }

  static int64_t floats(const Backward& all) {
    return packed_floats(all.rows_at_a_time(), all.s.steps()) +
           packed_floats(all.rows_at_a_time(), all.s.out_channels) + 2 * all.padded() +
           all.images() * all.map_floats() + 4 * kLine;
  }

  /// Images [first, last); adds to the sums over pixels, [2][channels] if dx is computed. The
  /// images up to `next_last` come next.
  void run(int64_t first, int64_t last, int64_t next_last, double* sums) {
    const ConvGeometry& s = all_.s;
    look_ahead(last, next_last);
    std::fill_n(sums_, 2 * all_.padded(), 0.0f);
    if (scattered()) std::fill_n(map_, (last - first) * all_.map_floats(), 0.0f);
    const int64_t end = last * all_.out_pixels();
    for (int64_t row = first * all_.out_pixels(); row < end; row += all_.rows_at_a_time()) {
      run_rows(row, std::min(all_.rows_at_a_time(), end - row), first);
    }
    if (scattered()) mask_maps(first, last);
    if (!all_.panels || !all_.reader.scale) return;
    for (int64_t c = 0; c < s.channels; ++c) {
      sums[c] += sums_[c];
      sums[s.channels + c] += sums_[all_.padded() + c];
    }
  }

 private:
  void look_ahead(int64_t first, int64_t last) {
    const int64_t outputs = all_.out_pixels() * all_.s.out_channels;
    const int64_t inputs = all_.s.height * all_.s.width * all_.s.channels;
    ahead_ = Ahead();
    if (first >= last) return;
    ahead_.add(all_.gradient.dy + first * outputs, (last - first) * outputs);
    if (all_.dy.slope()) ahead_.add(all_.gradient.y + first * outputs, (last - first) * outputs);
    ahead_.add(all_.x.y + first * inputs, (last - first) * inputs);
    if (all_.dx) ahead_.add(all_.dx + first * inputs, (last - first) * inputs);
  }

  bool scattered() const { return all_.panels && !all_.s.pointwise(); }

  void run_rows(int64_t first, int64_t rows, int64_t first_image) {
    const ConvGeometry& s = all_.s;
    const int64_t at = first * s.out_channels;
    const bool plain = !all_.dy.slope();
    all_.loops.pack_gradient(
        {all_.gradient.dy + at, plain ? nullptr : all_.gradient.y + at,
         s.rows() * s.out_channels - at, all_.dy.slope(), all_.dy.offset(), rows, s.out_channels},
        dy_);
    if (all_.of_weight) {
      const float* x_end = all_.x.y + s.n * s.height * s.width * s.channels;
      all_.loops.pack_pixels({all_.x.y, x_end, first, rows, runs_.data(), int64_t(runs_.size())}, s,
                             all_.reader, a_);
      all_.loops.weight(a_, dy_, rows, s.steps(), s.out_channels, dweight_, &ahead_);
    }
    if (!all_.panels) return;
    const DataChunk chunk{dy_,    rows, s.out_channels, all_.panels, s.taps() * all_.padded(),
                          &ahead_};
    if (!scattered()) {
      all_.loops.data_pointwise(chunk, mask_of(first * s.channels, rows, nullptr));
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t pixel = first + r, image = pixel / all_.out_pixels();
      const int64_t y = pixel / s.out_width % s.out_height, x = pixel % s.out_width;
      scatter_rows_[r] = (image - first_image) * all_.map_floats() +
                         (y * all_.map_width() + x) * s.stride * all_.padded();
    }
    all_.loops.data_scattered(chunk,
                              {map_, scatter_rows_.data(), scatter_columns_.data(), all_.padded()});
  }

  /// The pixels of x from float `at` on, whose gradients are those in `g`.
  MaskChunk mask_of(int64_t at, int64_t pixels, const float* g) const {
    return {g,      all_.padded(),   all_.x.y + at, all_.dx + at, all_.s.channels,
            pixels, all_.s.channels, all_.reader,   sums_,        sums_ + all_.padded()};
  }

  void mask_maps(int64_t first, int64_t last) {
    const ConvGeometry& s = all_.s;
    for (int64_t image = first; image < last; ++image) {
      const float* map = map_ + (image - first) * all_.map_floats();
      for (int64_t y = 0; y < s.height; ++y) {
        const int64_t inside = (y + s.padding) * all_.map_width() + s.padding;
        const int64_t at = (image * s.height + y) * s.width * s.channels;
        all_.loops.mask(mask_of(at, s.width, map + inside * all_.padded()));
      }
    }
  }

  const Backward& all_;
  Packed a_, dy_;
  float *sums_, *map_, *dweight_;
  std::vector<int64_t> scatter_columns_, scatter_rows_;
  std::vector<Run> runs_;
  Ahead ahead_;
};

thread_local Workspace sums_of_groups;

/// dweight as the sum of what the groups found.
void join_weights(const Backward& all, const float* groups_dweight, int64_t groups,
                  const ConvResults& results, ThreadPool& pool) {
  const KernelStrides& strides = results.dweight_strides;
  const ConvGeometry& s = all.s;
  const int64_t panel = all.loops.panel, panels = ceil_div(s.out_channels, panel);
  pool.parallel_for(panels * s.taps(), [&](int, int64_t item) {
    const int64_t tap = item % s.taps(), first = item / s.taps() * panel;
    const int64_t width = std::min(panel, s.out_channels - first);
    float* out = results.dweight + first * strides.out + tap / s.kernel_width * strides.row +
                 tap % s.kernel_width * strides.column;
    // Some rows at a time, of one group after the other: each is a page or two.
    constexpr int64_t kTogether = 32;
    for (int64_t begin = 0; begin < s.channels; begin += kTogether) {
      alignas(64) float sums[kTogether][2 * kMostLanes] = {};
      const int64_t count = std::min(kTogether, s.channels - begin);
      const float* panel_of_group = groups_dweight + first * all.weight_rows();
      for (int64_t group = 0; group < groups; ++group, panel_of_group += all.weight_floats()) {
        for (int64_t c = 0; c < count; ++c) {
          const int64_t row = all.weight_row(tap * s.channels + begin + c);
          const float* from = panel_of_group + row * panel;
          for (int64_t j = 0; j < panel; ++j) sums[c][j] += from[j];
        }
      }
      for (int64_t j = 0; j < width; ++j) {
        float* to = out + j * strides.out + begin * strides.in;
        for (int64_t c = 0; c < count; ++c) to[c * strides.in] = sums[c][j];
      }
    }
  });
}

}  // namespace

void conv_backward(const ConvGradient& gradient, const DeferredMaps& x, const float* weight,
                   const KernelStrides& strides, const ConvGeometry& given,
                   const ConvResults& results, ThreadPool& pool) {
  if (winograd_serves(given)) {
    if (results.dx) winograd_data(gradient, x, weight, strides, given, results, pool);
    if (results.dweight) winograd_weight(gradient, x, given, results, pool);
    return;
  }
  const PaddedReader reader(x, given.channels);
  Backward all{conv_loops(), as_pixels(given), x,
               gradient,     reader.get(),     {gradient, given},
               nullptr,      results.dx,       results.dweight != nullptr};
  const ConvGeometry& s = all.s;
  if (results.dx) {
    float* panels =
        weight_memory().take(round_up(s.taps() * all.padded(), all.loops.panel) * s.out_channels);
    pack_transposed(weight, strides, s, panels, pool);
    all.panels = panels;
  }
  const int64_t groups = all.groups(), blocks = ceil_div(s.n, all.images());
  float* dweights = sums_of_groups.take(groups * all.weight_floats());
  std::vector<double> sums(groups * 2 * s.channels);
  pool.parallel_for(groups, [&](int, int64_t group) {
    float* dweight = dweights + group * all.weight_floats();
    std::fill_n(dweight, all.weight_floats(), 0.0f);
    BackwardPass pass(all, chunk_memory().take(BackwardPass::floats(all)), dweight);
    const int64_t last = part_begin(group + 1, groups, blocks);
    const auto begin = [&](int64_t block) { return std::min(s.n, block * all.images()); };
    for (int64_t block = part_begin(group, groups, blocks); block < last; ++block) {
      pass.run(begin(block), begin(block + 1), begin(std::min(block + 2, last)),
               sums.data() + group * 2 * s.channels);
    }
  });
  if (results.dweight) join_weights(all, dweights, groups, results, pool);
  if (results.dx && x.scale)
    join_sums(sums.data(), groups, s.channels, s.channels, results.dscale, results.dshift);
}

}  // namespace bagssl
