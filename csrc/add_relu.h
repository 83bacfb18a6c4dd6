#pragma once

#include "conv_bn_relu.h"
#include "thread_pool.h"

namespace bagssl {

// Number: float or BFloat16.

/// What is added to normalized maps: identity itself, or normalized as well where it has a scale,
/// and then its ReLU.
template <typename Number>
struct Identity {
  MapsOf<Number> maps;
  bool relu;
};

/// out = relu(scale * (x.y - center) + shift + identity) over `rows` pixels; x has a scale.
template <typename Number>
void add_relu(const MapsOf<Number>& x, const Identity<Number>& identity, int64_t rows,
              int64_t channels, Number* out, ThreadPool& pool);

/// Gradients: maps as out, vectors [channels]; those of identity's vectors only where it has them.
/// The gradient of a center is -scale * dshift.
template <typename Number>
struct AddReluResults {
  Number *dy, *didentity;
  float *dscale, *dshift, *didentity_scale, *didentity_shift;
};

template <typename Number>
void add_relu_backward(const Number* dout, const Number* out, const MapsOf<Number>& x,
                       const Identity<Number>& identity, int64_t rows, int64_t channels,
                       const AddReluResults<Number>& results, ThreadPool& pool);

}  // namespace bagssl
