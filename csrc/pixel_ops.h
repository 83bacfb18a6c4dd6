#pragma once

#include <cstdint>

#include "resize_weights.h"

namespace bagssl {

/// Three color planes of integer-valued floats in 0..255. `size` is a multiple of
/// kPlanePadding: pixels past the picture's end are zero before the first op.
struct Planes {
  float* channel[3] = {nullptr, nullptr, nullptr};
  int size = 0;
};
constexpr int kPlanePadding = 16;

/// Bytes that may be read (not used) past the end of a row handed to resize_rows.
constexpr int kRowPadding = 16;
/// Rows between the passes are RGBX, four bytes a pixel, and this many pixels wider than needed;
/// rows of planes are written up to this many floats past their end.
constexpr int kWidthPadding = 8;

/// The loops over pixels, in pixel_ops_body.h. Every SIMD level gives the same bits: a*b+c is not
/// contracted, and fused multiply-adds are written out where torch has them.
struct PixelOps {
  /// RGB -> RGBX, mirrored if asked for.
  void (*copy_row)(const uint8_t* row, int width, bool flip, uint8_t* out);
  /// The same for two rows, with a change of width to `weights.out` pixels.
  void (*resize_rows)(const uint8_t* row0, const uint8_t* row1, const AxisWeights& weights,
                      bool flip, uint8_t* out0, uint8_t* out1);
  /// RGBX -> one row of each plane.
  void (*unpack_row)(const uint8_t* rgbx, int width, float* r, float* g, float* b);
  /// The same from RGBX rows `stride` bytes apart: output row i of the vertical pass. One row
  /// more than there are may be read (not used).
  void (*resize_column)(const uint8_t* rows, int stride, const AxisWeights& weights, int i,
                        int width, float* r, float* g, float* b);

  // torchvision.transforms.v2.functional on uint8, in place.
  void (*brightness)(Planes planes, float factor);
  void (*contrast)(Planes planes, float factor, int pixels);
  void (*saturation)(Planes planes, float factor);
  void (*hue)(Planes planes, float shift);
  void (*grayscale)(Planes planes);
  void (*solarize)(Planes planes, float threshold);
  /// Weighted sum over `kernel` rows -> one row of `width` values; rows[k] are row pointers.
  void (*blur_column)(const float* const* rows, const float* weights, int kernel, int width,
                      float* out);
  /// The same along a row that was padded by kernel / 2 on either side; rounds half to even.
  /// Both read and write up to kWidthPadding values past a row's end.
  void (*blur_row)(const float* padded, const float* weights, int kernel, int width, float* out);

  void (*store_uint8)(Planes planes, int pixels, uint8_t* out);
  /// value * scale[c] + offset[c]
  void (*store_float)(Planes planes, int pixels, const float* scale, const float* offset,
                      float* out);
  /// table[c][value]
  void (*store_table)(Planes planes, int pixels, const uint16_t (*table)[256], uint16_t* out);
};

/// Those of the SIMD level in force.
const PixelOps& pixel_ops();

}  // namespace bagssl
