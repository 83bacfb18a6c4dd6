#pragma once

#include <cstdint>

#include "conv_bn_relu_pack.h"

namespace bagssl {

constexpr int kTile = 4;                    ///< outputs of a tile, along one side
constexpr int kWindow = 6;                  ///< inputs of a tile, along one side
constexpr int kPoints = kWindow * kWindow;  ///< numbers a tile becomes, and matrix products

// Columns of a point's matrix that are together, and floats from row to row. A tile is written to
// 36 places at once, which must be on few pages.
constexpr int64_t kPointBlock = 64, kPointRow = kPointBlock + 16;

/// Maps that are transformed, and how each of their numbers is computed on loading: as `reader`
/// says, or as x + slope * y + offset; null reader.scale and slope: x itself.
struct WinogradMaps {
  const float* x;  ///< [n, height, width, channels]
  int64_t height, width, channels;
  Reader reader;
  const float *y, *slope, *offset;  ///< y as x; the vectors of whole vectors of any level
};

/// Tiles [first, last) of maps that are cut into tiles of 4x4 from (-border, -border) on, numbered
/// image by image, row by row; and channels [first_channel, first_channel + channels).
struct TileRange {
  int64_t down, across;  ///< tiles of an image
  int64_t first, last, first_channel, channels, border;
};

/// Transformed tiles: number `point` of channel c of tile t is at data[point * step + c /
/// kPointBlock
/// * block + t * kPointRow + c % kPointBlock]. As in Packed, floats behind rows mean nothing.
struct Points {
  float* data;
  int64_t block, step;
};

/// For each point the product of its matrix and a panel of weights [kPoints][steps][panel].
struct PointProducts {
  Points a;
  int64_t rows, steps;
  const float* weight;
  const float* end;  ///< of all weights
  float* out;  ///< [kPoints][rows][panel], points out_step apart; whole register tiles are written
  int64_t out_step;
};

/// A panel of products that becomes outputs of the maps [n, height, width, channels] at `y`.
struct TileOutputs {
  const float* points;  ///< as PointProducts::out
  int64_t step;
  TileRange tiles;  ///< channels are those of the panel
  int64_t height, width, channels;
  float* y;
};

/// The loops over numbers, in winograd_body.h.
struct WinogradLoops {
  int64_t panel, tile_columns;
  /// Windows of 6x6, zeros outside of the map -> points.
  void (*from_windows)(const WinogradMaps& maps, const TileRange& tiles, const Points& out);
  /// Tiles of 4x4, zeros outside of the map -> points, as the gradient of outputs.
  void (*from_tiles)(const WinogradMaps& maps, const TileRange& tiles, const Points& out);
  void (*products)(const PointProducts& products);
  /// Outputs; and their mean and centered squares [panel] unless mean is null.
  void (*to_outputs)(const TileOutputs& outputs, float* mean, float* squares);
  /// Gradients of an activation of x, which become those of x at outputs.y; added to the sums.
  void (*to_gradients)(const TileOutputs& outputs, const float* x, const Reader& reader,
                       float* dscale, float* dshift);
  /// taps [9][panel] -> points, each [panel], `step` apart.
  void (*from_taps)(const float* taps, int64_t step, float* out);
  /// The gradient of from_taps, from the sum of `groups` sets of points.
  void (*to_taps)(const float* in, int64_t step, int64_t groups, int64_t group, float* taps);
  /// sums[point][panel of dy][sums_rows][panel] += the products over all tiles, the rows of
  /// each block of columns padded to tile_columns.
  void (*weight)(const Points& a, const Points& dy, int64_t tiles, int64_t columns,
                 int64_t channels, float* sums, int64_t sums_step, int64_t sums_rows);
};

const WinogradLoops& winograd_loops();

/// Numbers of one point apart by an odd number of cache lines: at a power of two they would all
/// compete for the same few places of a cache.
inline int64_t odd_lines(int64_t floats) { return (ceil_div(floats, kLine) | 1) * kLine; }

/// The points of so many tiles and channels in memory of points_floats.
inline Points points_at(float* memory, int64_t tiles, int64_t channels) {
  const int64_t block = (tiles + kMostTileRows) * kPointRow;
  return {memory, block, odd_lines(ceil_div(channels, kPointBlock) * block)};
}
inline int64_t points_floats(int64_t tiles, int64_t channels) {
  return kPoints * points_at(nullptr, tiles, channels).step;
}

}  // namespace bagssl
