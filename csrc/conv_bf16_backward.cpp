#include <algorithm>
#include <vector>

#include "conv_bf16_pack.h"

namespace bagssl {
namespace {

constexpr int64_t kWeightGroups = 16;            // each with its own dweight, of which
constexpr int64_t kGroupRows = 512;              // each is the sum of at least so many rows, and
constexpr int64_t kWeightFloats = 16 << 20;      // all have at most so many numbers
constexpr int64_t kManyWeights = 200'000;        // that are not in a core's cache beside the rest:
constexpr int64_t kRows = 256, kMoreRows = 512;  // more rows at a time go over them less often

/// The convolution that makes dx of dy, for stride 1: of dy, with the kernel turned round.
ConvGeometry turned_round(ConvGeometry s) {
  std::swap(s.height, s.out_height);
  std::swap(s.width, s.out_width);
  std::swap(s.channels, s.out_channels);
  s.padding = s.kernel_height - 1 - s.padding;
  return s;
}

/// A kernel's first weight and strides, where it is turned round.
template <typename Float>
Float* turn_round(Float* weight, const ConvGeometry& s, KernelStrides& strides) {
  weight += (s.kernel_height - 1) * strides.row + (s.kernel_width - 1) * strides.column;
  strides = {strides.in, strides.out, -strides.row, -strides.column};
  return weight;
}

/// What all threads of one backward pass read.
///
/// dweight is a product of windows and of pixels. For dx, too, those are windows of dy where the
/// stride is 1 and the kernel larger than 1 ("gathered"); else they are the windows of x that
/// forward read, and what dy gives to dx is added to maps.
struct Backward {
  const ConvLoops16& loops;
  ConvGeometry s;        // of the convolution
  ConvGeometry windows;  // whose windows are packed
  const MapsOf<BFloat16>& x;
  const GradientOf<BFloat16>& gradient;
  Reader reader;
  const GradientMap dy;
  bool of_weight, of_x, gathered;
  BFloat16* dx;
  const BFloat16* panels;  // of the weights that dx is multiplied by

  bool scattered() const { return of_x && !gathered && !s.pointwise(); }
  /// Rows of products: outputs, or pixels of x where windows are those of dy.
  int64_t pixels() const { return windows.out_height * windows.out_width; }
  int64_t rows() const { return windows.n * pixels(); }
  /// Channels beside the windows: of dy, or of x.
  int64_t channels() const { return windows.out_channels; }
  int64_t padded() const { return round_up(s.channels, kPanel16); }
  int64_t map_width() const { return s.width + 2 * s.padding; }
  int64_t map_floats() const { return (s.height + 2 * s.padding) * map_width() * padded(); }
  int64_t at_a_time() const {
    return of_weight && windows.steps() * channels() > kManyWeights ? kMoreRows : kRows;
  }
  /// Maps that are worked on together.
  int64_t images() const { return std::max<int64_t>(1, at_a_time() / pixels()); }
  /// Floats from row to row of dweight: not a power of two, which would meet in the cache.
  int64_t weight_step() const { return round_up(windows.steps(), kPanel16) + kLine; }
  int64_t weight_floats() const {
    return of_weight ? round_up(channels(), kPanel16) * weight_step() : 0;
  }
  int64_t groups() const {
    const int64_t blocks = ceil_div(windows.n, images());
    if (!of_weight) return std::min(blocks, kMostGroups);
    int64_t groups = 1;  // a power of two, as numbers of threads are
    while (groups < kWeightGroups && 2 * groups * kGroupRows <= rows() &&
           2 * groups * weight_floats() <= kWeightFloats) {
      groups *= 2;
    }
    return std::min(groups, blocks);
  }
  /// Steps of the product that is dx.
  int64_t data_steps() const { return gathered ? windows.steps() : s.out_channels; }
  int64_t tiles() const {
    const bool summed = of_x && !scattered() && Blocks16(data_steps()).count() > 1;
    return summed ? at_a_time() * padded() : 0;
  }
  int64_t floats() const {
    return 2 * packed_floats16(at_a_time()) + kPairFloats16 +
           packed_floats16(round_up(channels(), kPanel16)) + tiles() + 2 * padded() +
           (gathered ? WindowRows16::copy_floats(windows, images())
                     : Activation16::floats(s, x, images())) +
           (scattered() ? images() * map_floats() : 0) + 8 * kLine;
  }
};

/// One thread's memory for a group of images, and the passes over it.
class BackwardPass {
 public:
  BackwardPass(const Backward& all, Pieces pieces, float* dweight)
      : all_(all),
        rows_(take16(pieces, packed_floats16(all.at_a_time()))),
        pixels_(take16(pieces, packed_floats16(all.at_a_time()))),
        pairs_(take16(pieces, kPairFloats16)),
        turned_(take16(pieces, packed_floats16(round_up(all.channels(), kPanel16)))),
        tiles_(all.tiles() ? pieces.take(all.tiles()) : nullptr),
        sums_(pieces.take(2 * all.padded())),
        maps_(all.scattered() ? pieces.take(all.images() * all.map_floats()) : nullptr),
        dweight_(dweight) {
    const ConvGeometry& s = all.s;
    if (all.gathered) {
      gradients_.emplace_back(all.windows, nullptr, all.images(), pieces);
    } else {
      activations_.emplace_back(s, all.x, all.reader, all.images(), pieces);
    }
    if (!maps_) return;
    offsets_.resize(all.at_a_time());
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
    if (all_.gathered) write_gradients(first, last);
    if (!all_.gathered && all_.of_weight) activations_[0].take(first, last);
    const int64_t end = last * all_.pixels();
    for (int64_t row = first * all_.pixels(); row < end; row += all_.at_a_time()) {
      const int64_t rows = std::min(all_.at_a_time(), end - row);
      all_.gathered ? gather(row, rows) : scatter(row, rows, first);
    }
    if (maps_) mask_maps(first, last);
    if (!all_.of_x || !all_.reader.scale) return;
    for (int64_t c = 0; c < s.channels; ++c) {
      sums[c] += sums_[c];
      sums[s.channels + c] += sums_[all_.padded() + c];
    }
  }

 private:
  /// Channels from c on of the gradients of outputs from number `first` on.
  GradientRows16 gradients(int64_t first, int64_t rows, int64_t c, int64_t count,
                           int64_t ahead) const {
    const int64_t channels = all_.s.out_channels, at = first * channels + c;
    const float* slope = all_.dy.slope();
    return {{all_.gradient.dy + at, rows, count, channels, ahead},
            slope ? all_.gradient.y + at : nullptr,
            slope ? slope + c : nullptr,
            slope ? all_.dy.offset() + c : nullptr};
  }

  void write_gradients(int64_t first, int64_t last) {
    const ConvGeometry& s = all_.s;
    WindowRows16& maps = gradients_[0];
    maps.begin(first);
    const int64_t ahead = (last - first) * s.out_height * s.out_width * s.out_channels;
    for (int64_t image = first; image < last; ++image) {
      for (int64_t y = 0; y < s.out_height; ++y) {
        const int64_t row = (image * s.out_height + y) * s.out_width;
        all_.loops.write_gradient(gradients(row, s.out_width, 0, s.out_channels, ahead),
                                  maps.row(image, y));
      }
    }
  }

  /// Rows of pixels of x, from windows of dy.
  void gather(int64_t first, int64_t rows) {
    const ConvGeometry& s = all_.s;
    const ConvLoops16& loops = all_.loops;
    if (all_.of_weight) {
      const Blocks16 blocks(s.channels);
      for (int64_t c = 0; c < blocks.count(); ++c) {
        pack_block16(all_.x, all_.reader, s.channels, c, first, rows, pixels_);
        loops.transpose(pixels_, rows, blocks.length_of(c), turned_ + blocks.first(c) * kRowStep16);
      }
    }
    const Blocks16 blocks(all_.windows.steps());
    for (int64_t k = 0; k < blocks.count(); ++k) {
      gradients_[0].pack(first, rows, k, rows_);
      loops.data(product(rows_, rows, blocks, k), mask_of(first * s.channels, rows, nullptr));
      if (all_.of_weight) add_weights(rows, blocks, k);
    }
  }

  /// Rows of outputs, from windows of x.
  void scatter(int64_t first, int64_t rows, int64_t first_image) {
    const ConvGeometry& s = all_.s;
    const ConvLoops16& loops = all_.loops;
    for (int64_t r = 0; maps_ && r < rows; ++r) {
      const int64_t pixel = first + r, image = pixel / all_.pixels();
      const int64_t y = pixel / s.out_width % s.out_height, x = pixel % s.out_width;
      offsets_[r] = (image - first_image) * all_.map_floats() +
                    (y * all_.map_width() + x) * s.stride * all_.padded();
    }
    const Blocks16 channels(s.out_channels);
    for (int64_t n = 0; n < channels.count(); ++n) {
      const int64_t count = channels.length_of(n);
      loops.pack_gradient(gradients(first, rows, channels.first(n), count, rows * s.out_channels),
                          pixels_);
      if (all_.of_weight) {
        loops.transpose(pixels_, rows, count, turned_ + channels.first(n) * kRowStep16);
      }
      if (maps_) {
        loops.data_scattered(product(pixels_, rows, channels, n),
                             {maps_, offsets_.data(), panels_.data(), all_.padded() / kPanel16});
      } else if (all_.of_x) {
        loops.data(product(pixels_, rows, channels, n), mask_of(first * s.channels, rows, nullptr));
      }
    }
    if (!all_.of_weight) return;
    const Blocks16 blocks(s.steps());
    for (int64_t k = 0; k < blocks.count(); ++k) {
      activations_[0].pack(first, rows, k, rows_);
      add_weights(rows, blocks, k);
    }
  }

  /// Of dx, from block k of its steps.
  Product16 product(const BFloat16* a, int64_t rows, const Blocks16& blocks, int64_t k) const {
    const int64_t columns = all_.scattered() ? all_.s.taps() * all_.padded() : all_.padded();
    return {a,
            rows,
            blocks.length_of(k),
            all_.panels + blocks.first(k) * kPanel16,
            panel_numbers16(blocks.all),
            columns,
            tiles_,
            k == 0,
            k + 1 == blocks.count()};
  }

  void add_weights(int64_t rows, const Blocks16& blocks, int64_t k) {
    all_.loops.interleave(rows_, rows, blocks.length_of(k), pairs_);
    all_.loops.weight(turned_, pairs_, rows, blocks.length_of(k), all_.channels(),
                      dweight_ + blocks.first(k), all_.weight_step());
  }

  /// The pixels of x from number `at` on, whose gradients are those in `g`.
  MaskChunk16 mask_of(int64_t at, int64_t pixels, const float* g) const {
    const int64_t channels = all_.s.channels;
    return {g,        all_.padded(),     all_.x.y + at, all_.dx + at, pixels,
            channels, pixels * channels, all_.reader,   sums_,        sums_ + all_.padded()};
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
  BFloat16 *rows_, *pixels_, *pairs_, *turned_;
  float *tiles_, *sums_, *maps_, *dweight_;
  std::vector<WindowRows16> gradients_;    // one of dy, or
  std::vector<Activation16> activations_;  // one of x
  std::vector<int64_t> panels_, offsets_;
};

thread_local Workspace sums_of_groups;

/// dweight as the sum of what the groups found, squares of rows and columns at a time: neighbors in
/// either of them may be neighbors in memory.
void join_weights(const Backward& all, const float* groups_dweight, int64_t groups, float* dweight,
                  const KernelStrides& strides, ThreadPool& pool) {
  const ConvGeometry& s = all.windows;
  const int64_t panels = ceil_div(s.steps(), kPanel16);
  pool.parallel_for(ceil_div(s.out_channels, kPanel16) * panels, [&](int, int64_t item) {
    const int64_t row = item / panels * kPanel16, panel = item % panels * kPanel16;
    const int64_t rows = std::min(kPanel16, s.out_channels - row);
    float sums[kPanel16][kPanel16] = {};
    const float* from = groups_dweight + row * all.weight_step() + panel;
    for (int64_t group = 0; group < groups; ++group, from += all.weight_floats()) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < kPanel16; ++j) sums[r][j] += from[r * all.weight_step() + j];
      }
    }
    int64_t places[kPanel16];  // by column of dweight
    int8_t sources[kPanel16];
    int64_t columns = 0;
    for (int64_t j = 0; j < kPanel16; ++j) {
      const int64_t k = panel + all.loops.order[j], tap = k / s.channels;
      if (k >= s.steps()) continue;
      ++columns;
      sources[k - panel] = static_cast<int8_t>(j);
      places[k - panel] = k % s.channels * strides.in + tap / s.kernel_width * strides.row +
                          tap % s.kernel_width * strides.column;
    }
    float* to = dweight + row * strides.out;
    if (strides.out < strides.in) {
      for (int64_t k = 0; k < columns; ++k) {
        for (int64_t r = 0; r < rows; ++r) {
          to[r * strides.out + places[k]] = sums[r][sources[k]];
        }
      }
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t k = 0; k < columns; ++k) {
          to[r * strides.out + places[k]] = sums[r][sources[k]];
        }
      }
    }
  });
}

}  // namespace

void conv_backward(const GradientOf<BFloat16>& gradient, const MapsOf<BFloat16>& x,
                   const float* weight, const KernelStrides& strides, const ConvGeometry& given,
                   const ResultsOf<BFloat16>& results, ThreadPool& pool) {
  const PaddedReader reader(x, given.channels);
  const ConvGeometry s = as_pixels(given);
  const bool of_x = results.dx != nullptr;
  const bool gathered = of_x && s.stride == 1 && !s.pointwise() && s.padding < s.kernel_height &&
                        s.kernel_height == s.kernel_width;
  Backward all{conv_loops16(),
               s,
               gathered ? turned_round(s) : s,
               x,
               gradient,
               reader.get(),
               {gradient, given},
               results.dweight != nullptr,
               of_x,
               gathered,
               results.dx,
               nullptr};
  KernelStrides weight_strides = strides, dweight_strides = results.dweight_strides;
  float* dweight = results.dweight;
  if (gathered) {
    weight = turn_round(weight, s, weight_strides);
    if (dweight) dweight = turn_round(dweight, s, dweight_strides);
  }
  if (of_x) {
    const int64_t columns = gathered || s.pointwise() ? all.padded() : s.taps() * all.padded();
    auto* panels = reinterpret_cast<BFloat16*>(
        weight_memory().take(columns / kPanel16 * panel_numbers16(all.data_steps()) / 2));
    if (gathered) {
      pack_weight16(weight, weight_strides, all.windows, panels, pool);
    } else {
      pack_transposed16(weight, strides, s, panels, pool);
    }
    all.panels = panels;
  }
  const int64_t groups = all.groups(), blocks = ceil_div(s.n, all.images());
  float* dweights = sums_of_groups.take(groups * all.weight_floats());
  std::vector<double> sums(groups * 2 * s.channels);
  pool.parallel_for(groups, [&](int, int64_t group) {
    float* own = dweights + group * all.weight_floats();
    std::fill_n(own, all.weight_floats(), 0.0f);
    BackwardPass pass(all, Pieces(chunk_memory().take(all.floats())), own);
    const int64_t last = part_begin(group + 1, groups, blocks);
    for (int64_t block = part_begin(group, groups, blocks); block < last; ++block) {
      pass.run(block * all.images(), std::min(s.n, (block + 1) * all.images()),
               sums.data() + group * 2 * s.channels);
    }
  });
  if (dweight) join_weights(all, dweights, groups, dweight, dweight_strides, pool);
  if (of_x && x.scale) {
    join_sums(sums.data(), groups, s.channels, s.channels, results.dscale, results.dshift);
  }
}

}  // namespace bagssl
