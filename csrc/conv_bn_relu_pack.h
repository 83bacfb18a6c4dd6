#pragma once

// What forward and backward of conv_bn_relu share: chunks of rows, packed operands, their memory.

#include <cstdint>
#include <vector>

#include "conv_bn_relu_ops.h"
#include "workspace.h"

namespace bagssl {

// None of these depends on the number of threads, so that results do not.
constexpr int64_t kChunkRows = 72;          ///< packed at a time; tiles of 12, 6 and 4 rows fit
constexpr int64_t kChunkFloats = 96 << 10;  ///< of a packed chunk, where rows are long
constexpr int64_t kMostGroups = 64;         ///< of chunks, each with its own sums
constexpr int64_t kLine = 16;               ///< floats in a cache line

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/// The first of the items of part `part` out of `parts`.
inline int64_t part_begin(int64_t part, int64_t parts, int64_t items) {
  return part * items / parts;
}

/// The loops of the level in force.
const ConvLoops& conv_loops();

/// Rows of so many columns that are packed at a time.
int64_t chunk_rows(int64_t columns);

/// What a packed matrix takes.
int64_t packed_floats(int64_t rows, int64_t columns);

/// Cuts one piece of memory into pieces that begin at cache lines.
class Pieces {
 public:
  explicit Pieces(float* memory) : next_(memory) {}
  float* take(int64_t floats) {
    float* piece = next_;
    next_ += round_up(floats, kLine);
    return piece;
  }
  Packed packed(int64_t rows, int64_t columns) {
    return {take(packed_floats(rows, columns)), (rows + kMostTileRows) * kRowStep};
  }

 private:
  float* next_;
};

/// A pointwise convolution is one of single pixels: chunks need not be whole maps.
ConvGeometry as_pixels(ConvGeometry s);

/// The runs of a window, each in one block of the packed row. Where nothing is computed and nothing
/// padded (`plain`: x has no scale), a row of the window is one.
std::vector<Run> runs_of(const ConvGeometry& s, bool plain, int64_t block);

/// Panels [steps][panel] of the weights: what a window is multiplied by.
void pack_weight(const float* weight, const KernelStrides& strides, const ConvGeometry& s,
                 float* out, ThreadPool& pool);

/// Panels [out_channels][panel] of the weights transposed: the columns are the taps' channels,
/// those of each tap padded to whole vectors.
void pack_transposed(const float* weight, const KernelStrides& strides, const ConvGeometry& s,
                     float* out, ThreadPool& pool);

/// dy = g + slope * y + offset per channel: what the gradients of the moments add to that of y.
class GradientMap {
 public:
  template <typename Number>
  GradientMap(const GradientOf<Number>& gradient, const ConvGeometry& geometry)
      : GradientMap(geometry, gradient.mean, gradient.dmean, gradient.dvar) {}
  GradientMap(const ConvGeometry& geometry, const float* mean, const float* dmean,
              const float* dvar);
  const float* slope() const { return slope_.empty() ? nullptr : slope_.data(); }
  const float* offset() const { return slope() ? offset_.data() : nullptr; }

 private:
  std::vector<float> slope_, offset_;  // of whole vectors of any level; empty: dy = g
};

/// dscale and dshift from `groups` sums [2][padded] over pixels.
void join_sums(const double* sums, int64_t groups, int64_t padded, int64_t channels, float* dscale,
               float* dshift);

/// Memory that each thread keeps: for packed weights, and for what it works on.
Workspace& weight_memory();
Workspace& chunk_memory();

}  // namespace bagssl
