#pragma once

#include "conv_bn_relu.h"
#include "thread_pool.h"

namespace bagssl {

// Number: float or BFloat16.

/// Means [n, channels] over the `pixels` of each of n maps of an activation with a scale.
template <typename Number>
void relu_mean(const MapsOf<Number>& x, int64_t n, int64_t pixels, int64_t channels, float* means,
               ThreadPool& pool);

/// Gradients of `means` -> dx [n, pixels, channels], of x.y, and dscale, dshift [channels].
template <typename Number>
void relu_mean_backward(const float* dmeans, const MapsOf<Number>& x, int64_t n, int64_t pixels,
                        int64_t channels, Number* dx, float* dscale, float* dshift,
                        ThreadPool& pool);

}  // namespace bagssl
