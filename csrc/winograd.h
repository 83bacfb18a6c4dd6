#pragma once

// 3x3 convolutions with stride 1 by Winograd's F(4x4, 3x3) (Lavin and Gray, 1509.09308), as
// conv_bn_relu runs them: the map is cut into tiles of 4x4 outputs, each of which sees 6x6 inputs;
// a tile becomes 36 numbers per channel and the convolution 36 matrix products, 4 times fewer
// multiply-adds than the sum over taps. Numbers are read and written as conv_bn_relu.h says.

#include <cstdint>

#include "conv_bn_relu_pack.h"

namespace bagssl {

/// Whether this convolution is faster that way.
bool winograd_serves(const ConvGeometry& geometry);

/// As conv_forward.
void winograd_forward(const DeferredMaps& x, const float* weight, const KernelStrides& strides,
                      const ConvGeometry& geometry, float* y, float* mean, float* var,
                      ThreadPool& pool);

/// results.dx, with dscale and dshift where x has a scale.
void winograd_data(const ConvGradient& gradient, const DeferredMaps& x, const float* weight,
                   const KernelStrides& strides, const ConvGeometry& geometry,
                   const ConvResults& results, ThreadPool& pool);

/// results.dweight.
void winograd_weight(const ConvGradient& gradient, const DeferredMaps& x,
                     const ConvGeometry& geometry, const ConvResults& results, ThreadPool& pool);

}  // namespace bagssl
