#pragma once

#include <cstdint>

#include "winograd.h"

namespace bagssl {

constexpr int kTile = 4;                    ///< outputs of a tile, along one side
constexpr int kWindow = 6;                  ///< inputs of a tile, along one side
constexpr int kPoints = kWindow * kWindow;  ///< numbers a tile becomes, and matrix products
constexpr int kPanel = 16;                  ///< channels that are worked on together

/// Maps in memory, [n, height, width, channels], and the tiles they are cut into, numbered image
/// by image, row by row.
struct Maps {
  int64_t n, height, width, channels;
  int64_t tiles_down() const { return (height + kTile - 1) / kTile; }
  int64_t tiles_across() const { return (width + kTile - 1) / kTile; }
  int64_t tiles() const { return n * tiles_down() * tiles_across(); }
};

/// Where transformed tiles lie: number `point` of channel c of tile t is at
/// point * points + (c / kPanel) * panels + t * tiles + c % kPanel. Channels are padded to whole
/// panels, by zeros where something is summed over them.
struct Layout {
  int64_t points, panels, tiles;
};

/// Tiles [first, last), and channels [first_channel, last_channel), multiples of kPanel but for
/// the end of the map; tile `first` and channel `first_channel` are number 0 of the layout.
struct Part {
  int64_t first, last, first_channel, last_channel;
};

/// A matrix product's operands for one point: out[r][16 p + j] (+)= sum_s a[r, s] b[p][s][j].
struct Product {
  const float* a;  ///< a[r, s] at a + r * a_row + s * a_step, a panel of rows a_panel further
  int64_t a_row, a_step, a_panel;
  int64_t rows, rows_in_panel;
  const float* b;  ///< panels of [steps][kPanel], b_panel apart
  int64_t b_panel, panels, steps;
  float* out;
  int64_t out_row;
  bool accumulate;
};

/// The loops over numbers, in winograd_body.h; the rest is winograd.cpp.
struct WinogradOps {
  /// Windows of 6x6 inputs, zeros outside of the map -> points.
  void (*from_windows)(const float* x, const Maps& maps, const Part& part, const Layout& layout,
                       float* out);
  /// Tiles of 4x4, zeros outside of the map -> points, as the gradient of `to_tiles`.
  void (*from_tiles)(const float* dy, const Maps& maps, const Part& part, const Layout& layout,
                     float* out);
  /// Points -> tiles of 4x4 outputs, the map's share of them.
  void (*to_tiles)(const float* points, const Layout& layout, const Maps& maps, const Part& part,
                   float* y);
  /// taps[9][kPanel] -> points, each kPanel numbers, `points` apart.
  void (*from_taps)(const float* taps, int64_t points, float* out);
  /// The gradient of from_taps.
  void (*to_taps)(const float* in, int64_t points, float* taps);
  void (*product)(const Product& product);
};

}  // namespace bagssl
