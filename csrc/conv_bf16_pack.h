#pragma once

// What forward and backward of the convolutions of bfloat16 share.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv_bf16_ops.h"
#include "conv_bn_relu_pack.h"

namespace bagssl {

// None of these depends on the number of threads, so that results do not.
constexpr int64_t kChunkRows16 = 256;           ///< packed at a time, and
constexpr int64_t kChunkNumbers16 = 384 << 10;  ///< so many numbers, where rows are long

/// The loops of the level in force.
const ConvLoops16& conv_loops16();

/// Rows of so many columns that are packed at a time: whole panels, at most kBlock16.
int64_t chunk_rows16(int64_t columns);

/// Floats that a packed matrix takes.
int64_t packed_floats16(int64_t rows, int64_t columns);

/// Pieces that are numbers of bfloat16.
inline BFloat16* take16(Pieces& pieces, int64_t count) {
  return reinterpret_cast<BFloat16*>(pieces.take(ceil_div(count, 2)));
}
Packed16 packed16(Pieces& pieces, int64_t rows, int64_t columns);

/// Panels of pairs of the weights, [steps up to whole panels / 2][32][2]: what a window is
/// multiplied by.
void pack_weight16(const float* weight, const KernelStrides& strides, const ConvGeometry& s,
                   BFloat16* out, ThreadPool& pool);

/// The same of the weights transposed: columns are the taps' channels, those of each tap padded to
/// whole panels.
void pack_transposed16(const float* weight, const KernelStrides& strides, const ConvGeometry& s,
                       BFloat16* out, ThreadPool& pool);

/// Packs the activation that a convolution reads, a row for each of its outputs.
class Activation16 {
 public:
  /// Floats of memory for maps of so many images.
  static int64_t floats(const ConvGeometry& s, const MapsOf<BFloat16>& x, int64_t images) {
    return is_copied(s, x) ? ceil_div(images * map_numbers(s), 2) + 2 * kLine : 0;
  }

  Activation16(const ConvGeometry& s, const MapsOf<BFloat16>& x, const Reader& reader,
               int64_t images, Pieces& pieces);

  /// Of images [first, last), whose rows can be packed then.
  void take(int64_t first, int64_t last);

  /// Rows of outputs [first, first + rows), numbers over all images.
  void pack(int64_t first, int64_t rows, const Packed16& to) const;

 private:
  static bool is_copied(const ConvGeometry& s, const MapsOf<BFloat16>& x) {
    return !s.pointwise() && (x.scale || s.padding > 0);
  }
  static int64_t map_numbers(const ConvGeometry& s) {
    return (s.height + 2 * s.padding) * (s.width + 2 * s.padding) * s.channels;
  }

  const ConvGeometry& s_;
  const MapsOf<BFloat16>& x_;
  Reader reader_;
  BFloat16* maps_;  // null: windows are read from x itself
  int64_t first_ = 0;
  std::vector<Run16> runs_;
};

}  // namespace bagssl
