#include "relu_mean.h"

#include <algorithm>
#include <vector>

#include "padded_reader.h"

namespace bagssl {
namespace {

/// Some maps [n, pixels, channels] of a batch, and how their activation is computed.
template <typename Number>
struct Part {
  const Number* x;
  int64_t n, pixels, channels;
  const float *scale, *shift, *center;  // padded to whole vectors
};

}  // namespace
}  // namespace bagssl

#define BAGSSL_BODY "relu_mean_body.h"
#define BAGSSL_UP_TO_AMX
#include "simd_levels.h"

namespace bagssl {
namespace {

// Maps whose gradients are summed in float32 before those of all are in double.
constexpr int64_t kMapsTogether = 32;

template <typename Number>
Part<Number> part_of(const MapsOf<Number>& x, const Reader& reader, int64_t first, int64_t last,
                     int64_t pixels, int64_t channels) {
  return {x.y + first * pixels * channels,
          last - first,
          pixels,
          channels,
          reader.scale,
          reader.shift,
          reader.center};
}

}  // namespace

template <typename Number>
void relu_mean(const MapsOf<Number>& x, int64_t n, int64_t pixels, int64_t channels, float* means,
               ThreadPool& pool) {
  const PaddedReader reader(x, channels);
  pool.parallel_for((n + kMapsTogether - 1) / kMapsTogether, [&](int, int64_t item) {
    const int64_t first = item * kMapsTogether, last = std::min(n, first + kMapsTogether);
    BAGSSL_PICK(means_of<Number>)
    (part_of(x, reader.get(), first, last, pixels, channels), means + first * channels);
  });
}

template <typename Number>
void relu_mean_backward(const float* dmeans, const MapsOf<Number>& x, int64_t n, int64_t pixels,
                        int64_t channels, Number* dx, float* dscale, float* dshift,
                        ThreadPool& pool) {
  const PaddedReader reader(x, channels);
  const int64_t items = (n + kMapsTogether - 1) / kMapsTogether, padded = channels + 16;
  std::vector<float> sums(items * 2 * padded);
  pool.parallel_for(items, [&](int, int64_t item) {
    const int64_t first = item * kMapsTogether, last = std::min(n, first + kMapsTogether);
    float* own = sums.data() + item * 2 * padded;
    BAGSSL_PICK(gradients_of<Number>)
    (part_of(x, reader.get(), first, last, pixels, channels), dmeans + first * channels,
     dx + first * pixels * channels, own, own + padded);
  });
  for (int64_t c = 0; c < channels; ++c) {
    double of_scale = 0, of_shift = 0;
    for (int64_t item = 0; item < items; ++item) {
      of_scale += sums[item * 2 * padded + c];
      of_shift += sums[(item * 2 + 1) * padded + c];
    }
    dscale[c] = static_cast<float>(of_scale);
    dshift[c] = static_cast<float>(of_shift);
  }
}

template void relu_mean(const DeferredMaps&, int64_t, int64_t, int64_t, float*, ThreadPool&);
template void relu_mean(const MapsOf<BFloat16>&, int64_t, int64_t, int64_t, float*, ThreadPool&);
template void relu_mean_backward(const float*, const DeferredMaps&, int64_t, int64_t, int64_t,
                                 float*, float*, float*, ThreadPool&);
template void relu_mean_backward(const float*, const MapsOf<BFloat16>&, int64_t, int64_t, int64_t,
                                 BFloat16*, float*, float*, ThreadPool&);

}  // namespace bagssl
