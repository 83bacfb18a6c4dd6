#pragma once

#include "conv_bn_relu.h"
#include "thread_pool.h"

namespace bagssl {

/// What is added to normalized maps: identity itself, or normalized as well where it has a scale,
/// and then its ReLU.
struct Identity {
  DeferredMaps maps;
  bool relu;
};

/// out = relu(scale * (x.y - center) + shift + identity) over `rows` pixels; x has a scale.
void add_relu(const DeferredMaps& x, const Identity& identity, int64_t rows, int64_t channels,
              float* out, ThreadPool& pool);

/// Gradients: maps as out, vectors [channels]; those of identity's vectors only where it has them.
/// The gradient of a center is -scale * dshift.
struct AddReluResults {
  float *dy, *dscale, *dshift;
  float *didentity, *didentity_scale, *didentity_shift;
};

void add_relu_backward(const float* dout, const float* out, const DeferredMaps& x,
                       const Identity& identity, int64_t rows, int64_t channels,
                       const AddReluResults& results, ThreadPool& pool);

}  // namespace bagssl
