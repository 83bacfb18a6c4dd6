// The loops of add_relu.cpp, over some rows of pixels; see simd_levels.h.

enum class Added { kItself, kNormalized, kActivation };

template <Added kAdded>
inline Floats added(const AddPart& p, int64_t at, int64_t c, int64_t left) {
  const Floats x = load_some(p.identity + at, left), zero = {};
  if (kAdded == Added::kItself) return x;
  const Floats a = multiply_add(x, load(p.of_identity.scale + c), load(p.of_identity.shift + c));
  if (kAdded == Added::kNormalized) return a;
  return a < zero ? zero : a;  // of NaN NaN
}

template <Added kAdded>
inline void add_rows(const AddPart& p, float* out) {
  const Floats zero = {};
  for (int64_t at = 0; at < p.rows * p.channels; at += p.channels) {
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      const int64_t left = p.channels - c;
      const Floats y = load_some(p.y + at + c, left);
      const Floats normalized = multiply_add(y, load(p.of_y.scale + c), load(p.of_y.shift + c));
      const Floats sum = normalized + added<kAdded>(p, at + c, c, left);
      store_some(out + at + c, sum < zero ? zero : sum, left);  // of NaN NaN
    }
  }
}

void add(const AddPart& p, bool relu, float* out) {
  if (!p.of_identity.scale) return add_rows<Added::kItself>(p, out);
  if (!relu) return add_rows<Added::kNormalized>(p, out);
  add_rows<Added::kActivation>(p, out);
}

/// Adds to the sums [4][padded] over pixels: of the gradient times y - center, and the gradient;
/// and the same two of identity.
template <Added kAdded>
inline void gradients_of_rows(const AddPart& p, const float* dout, const float* out, float* dy,
                              float* didentity, float* sums, int64_t padded) {
  const Floats zero = {};
  for (int64_t at = 0; at < p.rows * p.channels; at += p.channels) {
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      const int64_t left = p.channels - c, i = at + c;
      const Floats all = load_some(dout + i, left);
      const Floats g = load_some(out + i, left) > zero ? all : zero;
      store_some(dy + i, g * load(p.of_y.scale + c), left);
      const Floats deviation = load_some(p.y + i, left) - load(p.of_y.center + c);
      store(sums + c, multiply_add(g, deviation, load(sums + c)));
      store(sums + padded + c, load(sums + padded + c) + g);
      if (kAdded == Added::kItself) {
        store_some(didentity + i, g, left);
        continue;
      }
      const Floats x = load_some(p.identity + i, left), scale = load(p.of_identity.scale + c);
      const Floats active = multiply_add(x, scale, load(p.of_identity.shift + c));
      const Floats own = kAdded == Added::kActivation ? (active > zero ? g : zero) : g;
      store_some(didentity + i, own * scale, left);
      float* more = sums + 2 * padded + c;
      store(more, multiply_add(own, x - load(p.of_identity.center + c), load(more)));
      store(more + padded, load(more + padded) + own);
    }
  }
}

void gradients(const AddPart& p, bool relu, const float* dout, const float* out, float* dy,
               float* didentity, float* sums, int64_t padded) {
  if (!p.of_identity.scale) {
    return gradients_of_rows<Added::kItself>(p, dout, out, dy, didentity, sums, padded);
  }
  if (!relu) {
    return gradients_of_rows<Added::kNormalized>(p, dout, out, dy, didentity, sums, padded);
  }
  gradients_of_rows<Added::kActivation>(p, dout, out, dy, didentity, sums, padded);
}
