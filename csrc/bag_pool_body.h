// The loops of bag_pool.h over one bag, once per SIMD level: see simd_levels.h.
//
// A bag is passed over twice, and the second time it is in the cache: memory is read once in
// forward, read once and written once in backward. Sums run in kSums lanes whatever the level, so
// that all of them give the same bits.

constexpr int64_t kSums = 16;
constexpr int64_t kBlock = 1024;  // values of one row passed over together: a page of float32

BAGSSL_INLINE float root(float x) { return __builtin_sqrtf(x); }
BAGSSL_INLINE double root(double x) { return __builtin_sqrt(x); }

BAGSSL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
BAGSSL_INLINE void fill(T* out, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) out[i] = value;
}

template <typename T>
T sum_of(const T (&lanes)[kSums]) {
  T total = 0;
  for (T lane : lanes) total += lane;
  return total;
}

/// mean += x over n values; gives |x|^2.
template <typename T>
BAGSSL_INLINE T add_row(const T* __restrict x, int64_t n, T* __restrict mean) {
  T lanes[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int64_t j = 0; j < kSums; ++j) {
      mean[i + j] += x[i + j];
      lanes[j] += x[i + j] * x[i + j];
    }
  }
  for (int64_t j = 0; i + j < n; ++j) {
    mean[i + j] += x[i + j];
    lanes[j] += x[i + j] * x[i + j];
  }
  return sum_of(lanes);
}

template <typename T>
BAGSSL_INLINE T dot(const T* __restrict x, const T* __restrict y, int64_t n) {
  T lanes[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int64_t j = 0; j < kSums; ++j) lanes[j] += x[i + j] * y[i + j];
  }
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += x[i + j] * y[i + j];
  return sum_of(lanes);
}

template <typename T>
BAGSSL_INLINE T squared_distance(const T* __restrict x, const T* __restrict y, int64_t n) {
  T lanes[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int64_t j = 0; j < kSums; ++j) {
      const T d = x[i + j] - y[i + j];
      lanes[j] += d * d;
    }
  }
  for (int64_t j = 0; i + j < n; ++j) {
    const T d = x[i + j] - y[i + j];
    lanes[j] += d * d;
  }
  return sum_of(lanes);
}

template <typename T>
void forward(const Bags<T>& bags, const BagStatistics<T>& out, int64_t b, T* squares) {
  const int64_t P = bags.patches, D = bags.dim;
  T* mean = out.mean + b * D;
  fill(mean, D, T(0));
  for (int64_t p = 0; p < P; ++p) squares[p] = 0;
  for (int64_t start = 0; start < D; start += kBlock) {
    const int64_t n = smaller(kBlock, D - start);
    for (int64_t p = 0; p < P; ++p) {
      squares[p] += add_row(bags.row(p, b) + start, n, mean + start);
    }
    for (int64_t i = start; i < start + n; ++i) mean[i] /= static_cast<T>(P);
  }
  if (out.distance != nullptr) {
    T total = 0;
    for (int64_t p = 0; p < P; ++p) total += squared_distance(bags.row(p, b), mean, D);
    out.distance[b] = total;
  }
  if (out.norm != nullptr) {
    for (int64_t p = 0; p < P; ++p) {
      out.norm[p * bags.batch + b] = root(squares[p]);
      out.dot[p * bags.batch + b] = dot(bags.row(p, b), mean, D);
    }
  }
}

template <typename T>
void backward(const Bags<T>& bags, const BagGradient<T>& g, int64_t b, T* __restrict base, T* dx) {
  const int64_t P = bags.patches, B = bags.batch, D = bags.dim;
  const T* mean = g.mean + b * D;
  const T* dmean = g.dmean + b * D;
  const T share = T(1) / static_cast<T>(P);
  if (g.weight != nullptr) {
    fill(base, D, T(0));
    for (int64_t start = 0; start < D; start += kBlock) {
      const int64_t end = smaller(start + kBlock, D);
      for (int64_t p = 0; p < P; ++p) {
        const T* x = bags.row(p, b);
        const T w = g.weight[p * B + b];
        for (int64_t i = start; i < end; ++i) base[i] += w * x[i];
      }
    }
    const T unit = g.unit_scale[b];
    const T along = dot(base, mean, D) * unit * unit, factor = g.direction[b];
    for (int64_t i = 0; i < D; ++i) {
      base[i] = dmean[i] * share + factor * (base[i] - along * mean[i]);
    }
  } else {
    for (int64_t i = 0; i < D; ++i) base[i] = dmean[i] * share;
  }
  for (int64_t p = 0; p < P; ++p) {
    const T* __restrict x = bags.row(p, b);
    T* __restrict out = dx + (p * B + b) * D;
    const T of_x = g.of_x != nullptr ? g.of_x[p * B + b] : T(0);
    if (g.of_mean != nullptr) {
      const T of_mean = g.of_mean[p * B + b];
      for (int64_t i = 0; i < D; ++i) out[i] = base[i] + of_x * x[i] + of_mean * mean[i];
    } else if (g.of_x != nullptr) {
      for (int64_t i = 0; i < D; ++i) out[i] = base[i] + of_x * x[i];
    } else {
      for (int64_t i = 0; i < D; ++i) out[i] = base[i];
    }
  }
}
