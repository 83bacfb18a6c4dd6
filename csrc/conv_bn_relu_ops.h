#pragma once

#include <cstdint>

#include "conv_bn_relu.h"
#include "padded_reader.h"

namespace bagssl {

constexpr int64_t kBlock = 256;            ///< columns of a packed matrix that are together
constexpr int64_t kRowStep = kBlock + 16;  ///< floats from row to row: an odd number of lines
constexpr int64_t kMostLanes = 16;         ///< of any level
constexpr int64_t kMostTileRows = 12;      ///< of any level

/// A matrix whose entry (row, k) is at data[k / kBlock * block + row * kRowStep + k % kBlock]. The
/// constant step lets a kernel reach all of its rows from one pointer. Up to kMostLanes floats
/// behind each row, and kMostTileRows rows behind the last, are read and written, and mean nothing.
struct Packed {
  float* data;
  int64_t block;
};

/// Memory that will be read or written next: a product fetches a line of it with each of its steps.
struct Ahead {
  const float* at[4];
  int64_t floats[4];
  int count = 0, now = 0;

  void add(const float* from, int64_t length) {
    at[count] = from;
    floats[count++] = length;
  }
};

/// `count` neighboring floats of a window: `from` floats behind its corner, which is in channel
/// `channel` of the pixel (down, across) of the window, and `to` floats into a packed row.
struct Run {
  int64_t from, to, count, channel, down, across;
};

/// Rows of outputs, numbers [first, first + rows) over all maps, each read as the same runs.
struct PixelRows {
  const float* x;
  const float* end;  ///< of x: nothing is read from there on
  int64_t first, rows;
  const Run* runs;
  int64_t count;
};

struct ForwardChunk {
  Packed a;
  int64_t rows, steps;
  const float* weight;  ///< panels [steps][panel]
  float* y;             ///< of the first row
  int64_t channels;
  float *mean, *squares;  ///< of whole panels, zero at first; null: not computed
  Ahead* ahead;
};

/// dy = g + slope * y + offset; null slope: dy = g.
struct GradientRows {
  const float *g, *y;  ///< of the first row
  int64_t left;        ///< floats from there to the end of g
  const float *slope, *offset;
  int64_t rows, channels;
};

/// Gradients of an activation become those of what it was made from.
struct MaskChunk {
  const float* g;  ///< with respect to the activation, rows g_step apart
  int64_t g_step;
  const float* x;  ///< rows `step` apart, as dx
  float* dx;
  int64_t step, rows, channels;
  Reader reader;
  float *dscale, *dshift;  ///< added to; of whole vectors
};

struct DataChunk {
  Packed dy;
  int64_t rows, steps;
  const float* weight;  ///< panels [steps][panel]
  int64_t columns;      ///< of all panels
  Ahead* ahead;
};

/// Where the columns of a DataChunk are added to a map.
struct Scatter {
  float* map;
  const int64_t* rows;     ///< offset of each row
  const int64_t* columns;  ///< offset of each vector of columns
  int64_t tap_columns;     ///< of each tap
};

/// The loops over numbers, once per SIMD level; the rest is conv_bn_relu.cpp.
struct ConvLoops {
  int64_t lanes, panel;
  int64_t tile_columns;  ///< of dweight that are summed together
  void (*pack_pixels)(const PixelRows& rows, const ConvGeometry& geometry, const Reader& reader,
                      const Packed& to);
  void (*pack_gradient)(const GradientRows& rows, const Packed& to);
  void (*forward)(const ForwardChunk& chunk);
  /// dx of a pointwise convolution, chunk.columns being its channels; `mask` without its g.
  void (*data_pointwise)(const DataChunk& chunk, const MaskChunk& mask);
  void (*data_scattered)(const DataChunk& chunk, const Scatter& to);
  void (*mask)(const MaskChunk& chunk);
  /// dweight, panels of [columns of a][panel], each block's columns padded to tile_columns.
  void (*weight)(const Packed& a, const Packed& dy, int64_t rows, int64_t steps, int64_t channels,
                 float* dweight, Ahead* ahead);
};

}  // namespace bagssl
