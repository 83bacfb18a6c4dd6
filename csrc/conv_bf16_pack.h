#pragma once

// What forward and backward of the convolutions of bfloat16 share.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv_bf16_ops.h"
#include "conv_bn_relu_pack.h"

namespace bagssl {

// Rows that are packed at a time; with any number of threads, so that results do not depend on it.
constexpr int64_t kForwardRows16 = 256;

/// The loops of the level in force.
const ConvLoops16& conv_loops16();

/// Steps or channels in blocks of whole panels, about equal and none longer than kMost16.
struct Blocks16 {
  int64_t all, length;

  explicit Blocks16(int64_t count)
      : all(count), length(round_up(ceil_div(count, ceil_div(count, kMost16)), kPanel16)) {}
  int64_t count() const { return ceil_div(all, length); }
  int64_t first(int64_t block) const { return block * length; }
  int64_t length_of(int64_t block) const { return std::min(length, all - first(block)); }
};

/// Floats that a packed matrix takes, and pairs of kMost16 rows.
inline int64_t packed_floats16(int64_t rows) {
  return (round_up(rows, kPanel16) + kPanel16) * kRowStep16 / 2;
}
constexpr int64_t kPairFloats16 = kPairStep16;  // twice as many numbers

/// Pieces that are numbers of bfloat16, in so many floats.
inline BFloat16* take16(Pieces& pieces, int64_t floats) {
  return reinterpret_cast<BFloat16*>(pieces.take(floats));
}

/// Numbers in a panel of weights of so many steps.
inline int64_t panel_numbers16(int64_t steps) { return round_up(steps, kPanel16) * kPanel16; }

/// Panels of pairs of the weights, [steps up to whole panels / 2][32][2]: what a window is
/// multiplied by.
void pack_weight16(const float* weight, const KernelStrides& strides, const ConvGeometry& s,
                   BFloat16* out, ThreadPool& pool);

/// The same of the weights transposed: columns are the taps' channels, those of each tap padded to
/// whole panels.
void pack_transposed16(const float* weight, const KernelStrides& strides, const ConvGeometry& s,
                       BFloat16* out, ThreadPool& pool);

/// Packs the windows that a convolution of some images reads, a row for each of its outputs. The
/// maps are copies, in which what is padded is written, or are read where they are.
class WindowRows16 {
 public:
  /// `maps` of all images to read them there; null for copies of so many `images`.
  WindowRows16(const ConvGeometry& s, const BFloat16* maps, int64_t images, Pieces& pieces);
  static int64_t copy_floats(const ConvGeometry& s, int64_t images) {
    return ceil_div(images * map_numbers(s) + kPanel16, 2) + kLine;
  }

  /// Copies: the first image of those that come, and where rows of its map begin.
  void begin(int64_t image) { first_ = image; }
  BFloat16* row(int64_t image, int64_t y) {
    const int64_t width = s_.width + 2 * s_.padding;
    return copies_ + (image - first_) * map_numbers(s_) +
           ((y + s_.padding) * width + s_.padding) * s_.channels;
  }

  /// A block of the windows of outputs [first, first + rows), numbers over all images.
  void pack(int64_t first, int64_t rows, int64_t block, BFloat16* to) const;

 private:
  static int64_t map_numbers(const ConvGeometry& s) {
    return (s.height + 2 * s.padding) * (s.width + 2 * s.padding) * s.channels;
  }

  const ConvGeometry& s_;
  const BFloat16* maps_;
  BFloat16* copies_;
  int64_t first_ = 0, numbers_ = 0;
  Blocks16 blocks_;
  std::vector<std::vector<Run16>> runs_;  // of each block
};

/// Packs the activation that a convolution reads, a row for each of its outputs.
class Activation16 {
 public:
  Activation16(const ConvGeometry& s, const MapsOf<BFloat16>& x, const Reader& reader,
               int64_t images, Pieces& pieces)
      : s_(s),
        x_(x),
        reader_(reader),
        windows_(s, is_copied(s, x) ? nullptr : x.y, images, pieces) {}

  /// Floats of memory for maps of so many images.
  static int64_t floats(const ConvGeometry& s, const MapsOf<BFloat16>& x, int64_t images) {
    return is_copied(s, x) ? WindowRows16::copy_floats(s, images) : 0;
  }

  /// Of images [first, last), whose rows can be packed then.
  void take(int64_t first, int64_t last);

  /// A block of steps of rows of outputs [first, first + rows), numbers over all images.
  void pack(int64_t first, int64_t rows, int64_t block, BFloat16* to) const;

 private:
  static bool is_copied(const ConvGeometry& s, const MapsOf<BFloat16>& x) {
    return !s.pointwise() && (x.scale || s.padding > 0);
  }

  const ConvGeometry& s_;
  const MapsOf<BFloat16>& x_;
  Reader reader_;
  WindowRows16 windows_;
};

/// Pixels of x from number `first` on, channels of one block, with their reader.
void pack_block16(const MapsOf<BFloat16>& x, const Reader& reader, int64_t channels, int64_t block,
                  int64_t first, int64_t rows, BFloat16* to);

}  // namespace bagssl
