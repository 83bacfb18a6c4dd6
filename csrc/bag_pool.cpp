#include "bag_pool.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "clones.h"

// A bag is passed over twice, and the second time it is in the cache: memory is read once in
// forward, read once and written once in backward. Sums run in kLanes lanes whatever the
// processor has, so that all of them give the same bits.

namespace bagssl {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 1024;  // values of one row passed over together: a page of float32

template <typename T>
T sum_of(const T (&lanes)[kLanes]) {
  T total = 0;
  for (T lane : lanes) total += lane;
  return total;
}

/// mean += x over n values; gives |x|^2.
template <typename T>
inline __attribute__((always_inline)) T add_row(const T* __restrict x, int64_t n,
                                                T* __restrict mean) {
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
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
inline __attribute__((always_inline)) T dot(const T* __restrict x, const T* __restrict y,
                                            int64_t n) {
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * y[i + j];
  }
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += x[i + j] * y[i + j];
  return sum_of(lanes);
}

template <typename T>
inline __attribute__((always_inline)) T squared_distance(const T* __restrict x,
                                                         const T* __restrict y, int64_t n) {
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
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
inline __attribute__((always_inline)) void forward(const Bags<T>& bags, const BagStatistics<T>& out,
                                                   int64_t b, T* squares) {
  const int64_t P = bags.patches, D = bags.dim;
  T* mean = out.mean + b * D;
  std::fill(mean, mean + D, T(0));
  for (int64_t p = 0; p < P; ++p) squares[p] = 0;
  for (int64_t start = 0; start < D; start += kBlock) {
    const int64_t n = std::min(kBlock, D - start);
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
      out.norm[p * bags.batch + b] = std::sqrt(squares[p]);
      out.dot[p * bags.batch + b] = dot(bags.row(p, b), mean, D);
    }
  }
}

template <typename T>
inline __attribute__((always_inline)) void backward(const Bags<T>& bags, const BagGradient<T>& g,
                                                    int64_t b, T* __restrict base, T* dx) {
  const int64_t P = bags.patches, B = bags.batch, D = bags.dim;
  const T* mean = g.mean + b * D;
  const T* dmean = g.dmean + b * D;
  const T share = T(1) / static_cast<T>(P);
  if (g.weight != nullptr) {
    std::fill(base, base + D, T(0));
    for (int64_t start = 0; start < D; start += kBlock) {
      const int64_t end = std::min(start + kBlock, D);
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
      std::copy(base, base + D, out);
    }
  }
}

// Templates cannot be cloned for several processors, plain functions can.
BAGSSL_CLONES void forward_of(const Bags<float>& bags, const BagStatistics<float>& out, int64_t b,
                              float* squares) {
  forward(bags, out, b, squares);
}
BAGSSL_CLONES void forward_of(const Bags<double>& bags, const BagStatistics<double>& out, int64_t b,
                              double* squares) {
  forward(bags, out, b, squares);
}
BAGSSL_CLONES void backward_of(const Bags<float>& bags, const BagGradient<float>& gradient,
                               int64_t b, float* base, float* dx) {
  backward(bags, gradient, b, base, dx);
}
BAGSSL_CLONES void backward_of(const Bags<double>& bags, const BagGradient<double>& gradient,
                               int64_t b, double* base, double* dx) {
  backward(bags, gradient, b, base, dx);
}

}  // namespace

template <typename T>
void bag_pool(const Bags<T>& bags, const BagStatistics<T>& out, ThreadPool& pool) {
  std::vector<std::vector<T>> squares(pool.size(), std::vector<T>(bags.patches));
  pool.parallel_for(
      bags.batch, [&](int worker, int64_t b) { forward_of(bags, out, b, squares[worker].data()); });
}

template <typename T>
void bag_pool_backward(const Bags<T>& bags, const BagGradient<T>& gradient, T* dx,
                       ThreadPool& pool) {
  std::vector<std::vector<T>> base(pool.size(), std::vector<T>(bags.dim));
  pool.parallel_for(bags.batch, [&](int worker, int64_t b) {
    backward_of(bags, gradient, b, base[worker].data(), dx);
  });
}

template void bag_pool(const Bags<float>&, const BagStatistics<float>&, ThreadPool&);
template void bag_pool(const Bags<double>&, const BagStatistics<double>&, ThreadPool&);
template void bag_pool_backward(const Bags<float>&, const BagGradient<float>&, float*, ThreadPool&);
template void bag_pool_backward(const Bags<double>&, const BagGradient<double>&, double*,
                                ThreadPool&);

}  // namespace bagssl
