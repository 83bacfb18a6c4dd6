#pragma once

#include <cstdint>

#include "thread_pool.h"

namespace bagssl {

/// A convolution of maps [n, height, width, channels].
struct ConvGeometry {
  int64_t n, height, width, channels;
  int64_t out_height, out_width, out_channels;
  int64_t kernel_height, kernel_width, stride, padding;

  int64_t taps() const { return kernel_height * kernel_width; }
  int64_t steps() const { return taps() * channels; }  ///< products summed for one output
  int64_t rows() const { return n * out_height * out_width; }
  bool pointwise() const { return taps() == 1 && stride == 1 && padding == 0; }
};

/// Floats from one weight to its neighbor along each dimension.
struct KernelStrides {
  int64_t out, in, row, column;
};

/// What the convolution reads: relu(scale * (y - center) + shift), or y itself where scale is null.
struct DeferredMaps {
  const float* y;       ///< [n, height, width, channels]
  const float* center;  ///< [channels], as the other two
  const float* scale;
  const float* shift;
};

/// y [n, out_height, out_width, out_channels] and, unless mean is null, the mean and the biased
/// variance of each channel.
void conv_forward(const DeferredMaps& x, const float* weight, const KernelStrides& strides,
                  const ConvGeometry& geometry, float* y, float* mean, float* var,
                  ThreadPool& pool);

/// What backward is given, [out_channels] each: null dmean and dvar are zero.
struct ConvGradient {
  const float* dy;  ///< as y
  const float* y;
  const float* mean;
  const float* dmean;
  const float* dvar;
};

/// Results that are null are not computed. The gradient of center is -scale * dshift.
struct ConvResults {
  float* dx;      ///< with respect to x.y, as it
  float* dscale;  ///< [channels], as dshift; both come with dx where x has a scale
  float* dshift;
  float* dweight;
  KernelStrides dweight_strides;
};

void conv_backward(const ConvGradient& gradient, const DeferredMaps& x, const float* weight,
                   const KernelStrides& strides, const ConvGeometry& geometry,
                   const ConvResults& results, ThreadPool& pool);

}  // namespace bagssl
