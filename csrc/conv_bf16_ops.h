#pragma once

#include <cstdint>

#include "bfloat16.h"
#include "padded_reader.h"

namespace bagssl {

constexpr int64_t kPanel16 = 32;     ///< rows and columns of a tile of a product
constexpr int64_t kMost16 = 512;     ///< columns that are packed at a time, and rows
constexpr int64_t kRowStep16 = 544;  ///< numbers from row to row: an odd number of cache lines
constexpr int64_t kPairStep16 = (kMost16 / 2 + kPanel16) * kRowStep16;

// A packed matrix has rows of up to kMost16 columns, kRowStep16 apart, with zeros up to whole
// panels of rows and columns. Pairs are the same matrix with two rows in one, the columns of both
// beside each other: kMost16 / 2 columns, and the others kPairStep16 behind them. A panel behind
// each row and behind the last is read and written, and means nothing.

/// Some channels of pixels, one pixel after the other.
struct PixelRows16 {
  const BFloat16* x;  ///< of the first pixel
  int64_t rows, channels;
  int64_t step;   ///< numbers from pixel to pixel
  int64_t ahead;  ///< numbers from here to what will be read next
};

/// `count` neighboring numbers of a window: `from` behind its corner, `to` numbers into the row.
struct Run16 {
  int64_t from, to, count;
};

/// Windows over maps in which what is padded is written: row by row of outputs, those of numbers
/// [first, first + rows), `columns` of each.
struct Windows16 {
  const BFloat16 *maps, *end;  ///< nothing is read from `end` on
  int64_t height, width, channels, stride, out_height, out_width;
  int64_t first, rows;
  const Run16* runs;
  int64_t count, columns;
};

/// dy = g + slope * y + offset, as PixelRows16; null slope: dy = g.
struct GradientRows16 {
  PixelRows16 g;
  const BFloat16* y;
  const float *slope, *offset;
};

/// A block of the steps of a product of packed rows and panels of pairs of weights.
struct Product16 {
  const BFloat16* a;
  int64_t rows, steps;
  const BFloat16* weight;  ///< the first panel's, from this block on
  int64_t of_panel;        ///< numbers of a panel
  int64_t columns;
  float* tiles;      ///< [columns / 32][rows / 32][32][32], for sums of more than one block
  bool first, last;  ///< of the blocks
};

/// Where outputs go, and what is summed of them: of y - center, of whole panels, added to.
struct Outputs16 {
  BFloat16* y;  ///< of the first row
  int64_t channels;
  float *sums, *squares;  ///< null sums: neither
  float* center;
  bool centered;  ///< else center becomes the first row
};

/// Gradients of an activation become those of what it was made from.
struct MaskChunk16 {
  const float* g;  ///< with respect to the activation, rows g_step apart
  int64_t g_step;
  const BFloat16* x;  ///< [rows, channels], as dx
  BFloat16* dx;
  int64_t rows, channels;
  int64_t ahead;  ///< numbers from here to what will be written next
  Reader reader;
  float *dscale, *dshift;  ///< added to; of whole panels
};

/// Where the panels of a product are added to maps.
struct Scatter16 {
  float* maps;
  const int64_t* rows;    ///< offset of each row
  const int64_t* panels;  ///< offset of each panel
  int64_t of_tap;         ///< panels of each tap
};

/// The loops over numbers, once per SIMD level; the rest is conv_bf16.cpp.
struct ConvLoops16 {
  const int8_t* order;  ///< of the columns of each panel of dweight
  void (*pack_pixels)(const PixelRows16& rows, const Reader& reader, BFloat16* to);
  void (*pack_windows)(const Windows16& windows, BFloat16* to);
  void (*pack_gradient)(const GradientRows16& rows, BFloat16* to);
  /// As the two of pixels, one after the other.
  void (*write_pixels)(const PixelRows16& rows, const Reader& reader, BFloat16* to);
  void (*write_gradient)(const GradientRows16& rows, BFloat16* to);
  void (*transpose)(const BFloat16* from, int64_t rows, int64_t columns, BFloat16* to);
  void (*interleave)(const BFloat16* from, int64_t rows, int64_t columns, BFloat16* to);
  void (*forward)(const Product16& product, const Outputs16& to);
  /// dx of pixels whose gradients are the columns of the product; `mask` without its g.
  void (*data)(const Product16& product, const MaskChunk16& mask);
  void (*data_scattered)(const Product16& product, const Scatter16& to);
  void (*mask)(const MaskChunk16& chunk);
  /// dweight [channels][steps], rows `step` apart, of transposed rows and pairs; added to.
  void (*weight)(const BFloat16* turned, const BFloat16* pairs, int64_t rows, int64_t steps,
                 int64_t channels, float* dweight, int64_t step);
};

}  // namespace bagssl
