#pragma once

#include <cstdint>

#include "bfloat16.h"
#include "padded_reader.h"

namespace bagssl {

constexpr int64_t kPanel16 = 32;     ///< rows and columns of a tile of a product
constexpr int64_t kBlock16 = 512;    ///< columns of a packed matrix that are together
constexpr int64_t kRowStep16 = 544;  ///< numbers from row to row: an odd number of cache lines

/// A matrix whose entry (row, k) is at data[k / kBlock16 * block + row * kRowStep16 + k %
/// kBlock16], with zeros up to whole panels of rows and columns. Or its rows in pairs: half the
/// rows, and twice the columns, those of a pair beside each other. A panel behind each row and
/// behind the last is read and written, and means nothing.
struct Packed16 {
  BFloat16* data;
  int64_t block;
};

/// Some pixels of maps, one after the other.
struct PixelRows16 {
  const BFloat16* x;  ///< of the first
  int64_t rows, channels;
  int64_t ahead;  ///< numbers from here to what will be read next
};

/// `count` neighboring numbers of a window: `from` behind its corner, `to` numbers into the row.
struct Run16 {
  int64_t from, to, count;
};

/// Windows over maps in which what is padded is written: row by row of outputs, those of numbers
/// [first, first + rows).
struct Windows16 {
  const BFloat16 *maps, *end;  ///< nothing is read from `end` on
  int64_t height, width, channels, stride, out_height, out_width;
  int64_t first, rows;
  const Run16* runs;
  int64_t count, columns;
};

struct ForwardChunk16 {
  Packed16 a;
  int64_t rows, steps;
  const BFloat16* weight;  ///< panels of pairs
  BFloat16* y;             ///< of the first row
  int64_t channels;
  /// Of y - center, of whole panels; added to. Null: not computed.
  float *sums, *squares;
  float* center;
  bool centered;  ///< else center becomes the first row
};

/// dy = g + slope * y + offset; null slope: dy = g.
struct GradientRows16 {
  const BFloat16 *g, *y;  ///< of the first row
  const float *slope, *offset;
  int64_t rows, channels;
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

struct DataChunk16 {
  Packed16 dy;
  int64_t rows, steps;
  const BFloat16* weight;  ///< panels of pairs, transposed
  int64_t columns;         ///< of all panels
};

/// Where the panels of a DataChunk16 are added to maps.
struct Scatter16 {
  float* maps;
  const int64_t* rows;    ///< offset of each row
  const int64_t* panels;  ///< offset of each panel
  int64_t of_tap;         ///< panels of each tap
};

/// The loops over numbers, once per SIMD level; the rest is conv_bf16.cpp.
struct ConvLoops16 {
  const int8_t* order;  ///< of the columns of each panel of dweight
  void (*pack_pixels)(const PixelRows16& rows, const Reader& reader, const Packed16& to);
  void (*activate)(const PixelRows16& rows, const Reader& reader, BFloat16* to);
  void (*pack_windows)(const Windows16& windows, const Packed16& to);
  void (*pack_gradient)(const GradientRows16& rows, const Packed16& to);
  void (*transpose)(const Packed16& from, int64_t rows, int64_t columns, const Packed16& to);
  void (*interleave)(const Packed16& from, int64_t rows, int64_t columns, const Packed16& to);
  void (*forward)(const ForwardChunk16& chunk);
  /// dx of pixels whose gradients are the columns of the product; `mask` without its g.
  void (*data)(const DataChunk16& chunk, const MaskChunk16& mask);
  void (*data_scattered)(const DataChunk16& chunk, const Scatter16& to);
  void (*mask)(const MaskChunk16& chunk);
  /// dweight [channels][steps], rows `step` apart, of dy transposed and the pairs of a.
  void (*weight)(const Packed16& dy, const Packed16& a, int64_t rows, int64_t steps,
                 int64_t channels, float* dweight, int64_t step);
};

}  // namespace bagssl
