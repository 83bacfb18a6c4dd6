// The loops of relu_mean.cpp, over the maps of one part of a batch; see simd_levels.h.

#include "bfloat16_body.h"

template <typename Number>
void means_of(const Part<Number>& p, float* means) {
  const Floats zero = {}, share = splat(1.0f / static_cast<float>(p.pixels));
  for (int64_t n = 0; n < p.n; ++n, means += p.channels) {
    const Number* map = p.x + n * p.pixels * p.channels;
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      const int64_t left = p.channels - c;
      const Floats scale = load(p.scale + c), shift = load(p.shift + c);
      Floats sum = {};
      for (int64_t i = 0; i < p.pixels; ++i) {
        const Floats x = read_some(map + i * p.channels + c, left);
        const Floats a = multiply_add(x, scale, shift);
        sum += a < zero ? zero : a;  // of NaN NaN
      }
      store_some(means + c, sum * share, left);
    }
  }
}

template <typename Number>
void gradients_of(const Part<Number>& p, const float* dmeans, Number* dx, float* dscale,
                  float* dshift) {
  const Floats zero = {}, share = splat(1.0f / static_cast<float>(p.pixels));
  for (int64_t n = 0; n < p.n; ++n, dmeans += p.channels) {
    const int64_t at = n * p.pixels * p.channels;
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      const int64_t left = p.channels - c;
      const Floats scale = load(p.scale + c), shift = load(p.shift + c);
      const Floats center = load(p.center + c), g = load_some(dmeans + c, left) * share;
      const Floats dx_where_positive = g * scale;
      Floats count = {}, deviation = {};
      for (int64_t i = 0; i < p.pixels; ++i) {
        const Floats x = read_some(p.x + at + i * p.channels + c, left);
        const auto positive = multiply_add(x, scale, shift) > zero;
        write_some(dx + at + i * p.channels + c, positive ? dx_where_positive : zero, left);
        count += positive ? splat(1.0f) : zero;
        deviation += positive ? x - center : zero;
      }
      store(dshift + c, multiply_add(g, count, load(dshift + c)));
      store(dscale + c, multiply_add(g, deviation, load(dscale + c)));
    }
  }
}
