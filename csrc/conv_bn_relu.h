#pragma once

#include <cstdint>

#include "bfloat16.h"
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
template <typename Number>
struct MapsOf {
  const Number* y;      ///< [n, height, width, channels]
  const float* center;  ///< [channels], as the other two
  const float* scale;
  const float* shift;
};
using DeferredMaps = MapsOf<float>;

/// y [n, out_height, out_width, out_channels] and, unless mean is null, the mean and the biased
/// variance of each channel.
void conv_forward(const DeferredMaps& x, const float* weight, const KernelStrides& strides,
                  const ConvGeometry& geometry, float* y, float* mean, float* var,
                  ThreadPool& pool);

/// What backward is given, [out_channels] each: null dmean and dvar are zero.
template <typename Number>
struct GradientOf {
  const Number* dy;  ///< as y
  const Number* y;
  const float* mean;
  const float* dmean;
  const float* dvar;
};
using ConvGradient = GradientOf<float>;

/// Results that are null are not computed. The gradient of center is -scale * dshift.
template <typename Number>
struct ResultsOf {
  Number* dx;     ///< with respect to x.y, as it
  float* dscale;  ///< [channels], as dshift; both come with dx where x has a scale
  float* dshift;
  float* dweight;
  KernelStrides dweight_strides;
};
using ConvResults = ResultsOf<float>;

void conv_backward(const ConvGradient& gradient, const DeferredMaps& x, const float* weight,
                   const KernelStrides& strides, const ConvGeometry& geometry,
                   const ConvResults& results, ThreadPool& pool);

// The same for maps of bfloat16: activations, gradients of maps and weights are rounded to it where
// they are multiplied, sums and statistics are of float32.
void conv_forward(const MapsOf<BFloat16>& x, const float* weight, const KernelStrides& strides,
                  const ConvGeometry& geometry, BFloat16* y, float* mean, float* var,
                  ThreadPool& pool);
void conv_backward(const GradientOf<BFloat16>& gradient, const MapsOf<BFloat16>& x,
                   const float* weight, const KernelStrides& strides, const ConvGeometry& geometry,
                   const ResultsOf<BFloat16>& results, ThreadPool& pool);

}  // namespace bagssl
