#pragma once

#include <cstdint>

#include "thread_pool.h"

namespace bagssl {

/// A 3x3 convolution with stride 1 and padding 1 over channels-last maps: x [n, height, width,
/// in_channels], y [n, height, width, out_channels], all packed float32.
struct ConvShape {
  int64_t n, height, width, in_channels, out_channels;
};

/// Weights [out_channels, in_channels, 3, 3] in any memory format: distances in floats between
/// output channels, input channels and taps (the 9 taps lie evenly apart).
struct WeightStrides {
  int64_t out, in, tap;
};

/// y = conv(x, weight), every element written.
///
/// Winograd's F(4x4, 3x3) (Lavin and Gray, 1509.09308): the map is cut into tiles of 4x4 outputs,
/// each of which sees 6x6 inputs; a tile becomes 36 numbers per channel and the convolution 36
/// matrix products, 4 times fewer multiply-adds than the sum over taps.
void conv3x3(const float* x, const float* weight, float* y, const ConvShape& shape,
             WeightStrides strides, ThreadPool& pool);

/// dx from dy: conv3x3 with the taps turned around and the channels exchanged.
void conv3x3_dx(const float* dy, const float* weight, float* dx, const ConvShape& shape,
                WeightStrides strides, ThreadPool& pool);

/// dweight from x and dy. Sums over tiles are taken in one fixed order, whatever the pool's size.
void conv3x3_dweight(const float* x, const float* dy, float* dweight, const ConvShape& shape,
                     WeightStrides strides, ThreadPool& pool);

}  // namespace bagssl
