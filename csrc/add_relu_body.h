// The loops of add_relu.cpp, over some rows of pixels; see simd_levels.h.

#include "bfloat16_body.h"

enum class Added { kItself, kNormalized, kActivation };

template <Added kAdded, typename Number>
inline Floats added(const AddPart<Number>& p, int64_t at, int64_t c, int64_t left) {
  const Floats x = read_some(p.identity + at, left), zero = {};
  if (kAdded == Added::kItself) return x;
  const Floats a = multiply_add(x, load(p.of_identity.scale + c), load(p.of_identity.shift + c));
  if (kAdded == Added::kNormalized) return a;
  return a < zero ? zero : a;  // of NaN NaN
}

template <Added kAdded, typename Number>
inline void add_rows(const AddPart<Number>& p, Number* out) {
  const Floats zero = {};
  for (int64_t at = 0; at < p.rows * p.channels; at += p.channels) {
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      const int64_t left = p.channels - c;
      const Floats y = read_some(p.y + at + c, left);
      const Floats normalized = multiply_add(y, load(p.of_y.scale + c), load(p.of_y.shift + c));
      const Floats sum = normalized + added<kAdded>(p, at + c, c, left);
      write_some(out + at + c, sum < zero ? zero : sum, left);  // of NaN NaN
    }
  }
}

template <typename Number>
void add(const AddPart<Number>& p, bool relu, Number* out) {
  if (!p.of_identity.scale) return add_rows<Added::kItself>(p, out);
  if (!relu) return add_rows<Added::kNormalized>(p, out);
  add_rows<Added::kActivation>(p, out);
}

/// Adds to the sums [4][padded] over pixels: of the gradient times y - center, and the gradient;
/// and the same two of identity.
template <Added kAdded, typename Number>
inline void gradients_of_rows(const AddPart<Number>& p, const Number* dout, const Number* out,
                              Number* dy, Number* didentity, float* sums, int64_t padded) {
  const Floats zero = {};
  for (int64_t at = 0; at < p.rows * p.channels; at += p.channels) {
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      const int64_t left = p.channels - c, i = at + c;
      const Floats all = read_some(dout + i, left);
      const Floats g = read_some(out + i, left) > zero ? all : zero;
      write_some(dy + i, g * load(p.of_y.scale + c), left);
      const Floats deviation = read_some(p.y + i, left) - load(p.of_y.center + c);
      store(sums + c, multiply_add(g, deviation, load(sums + c)));
      store(sums + padded + c, load(sums + padded + c) + g);
      if (kAdded == Added::kItself) {
        write_some(didentity + i, g, left);
        continue;
      }
      const Floats x = read_some(p.identity + i, left), scale = load(p.of_identity.scale + c);
      const Floats active = multiply_add(x, scale, load(p.of_identity.shift + c));
      const Floats own = kAdded == Added::kActivation ? (active > zero ? g : zero) : g;
      write_some(didentity + i, own * scale, left);
      float* more = sums + 2 * padded + c;
      store(more, multiply_add(own, x - load(p.of_identity.center + c), load(more)));
      store(more + padded, load(more + padded) + own);
    }
  }
}

template <typename Number>
void gradients(const AddPart<Number>& p, bool relu, const Number* dout, const Number* out,
               Number* dy, Number* didentity, float* sums, int64_t padded) {
  if (!p.of_identity.scale) {
    return gradients_of_rows<Added::kItself>(p, dout, out, dy, didentity, sums, padded);
  }
  if (!relu) {
    return gradients_of_rows<Added::kNormalized>(p, dout, out, dy, didentity, sums, padded);
  }
  gradients_of_rows<Added::kActivation>(p, dout, out, dy, didentity, sums, padded);
}
