#pragma once

#include <cstdint>

#include "thread_pool.h"

namespace bagssl {

/// x [P, B, D] with rows of D packed values, the other two strides in elements.
template <typename T>
struct Bags {
  const T* x;
  int64_t patches, batch, dim;
  int64_t patch_stride, image_stride;

  const T* row(int64_t p, int64_t b) const { return x + p * patch_stride + b * image_stride; }
};

/// The statistics of each bag. `distance` and the pair `norm`, `dot` may be null: then their
/// passes over the bag are left out.
template <typename T>
struct BagStatistics {
  T* mean;      // [B, D]
  T* distance;  // [B]: sum over p of |x_p - mean|^2
  T* norm;      // [P, B]: |x_p|
  T* dot;       // [P, B]: x_p . mean
};

/// The factors of the gradient; all null but `dmean` and `of_x` where no cosine was asked for, and
/// `of_x` too where there was no deviation.
template <typename T>
struct BagGradient {
  const T* dmean;       // [B, D]: gradient with respect to the mean, cosine excepted
  const T* mean;        // [B, D]
  const T* of_x;        // [P, B]
  const T* of_mean;     // [P, B]
  const T* weight;      // [P, B]: w of direction = sum over p of w_p x_p
  const T* direction;   // [B]: factor of the direction's part across the mean
  const T* unit_scale;  // [B]: what makes the mean a unit vector
};

template <typename T>
void bag_pool(const Bags<T>& bags, const BagStatistics<T>& out, ThreadPool& pool);

/// dx [P, B, D], contiguous:
///   d = sum_p weight_p x_p,  u = unit_scale mean
///   dx_p = dmean / P + direction (d - (d . u) u) + of_x_p x_p + of_mean_p mean
template <typename T>
void bag_pool_backward(const Bags<T>& bags, const BagGradient<T>& gradient, T* dx,
                       ThreadPool& pool);

}  // namespace bagssl
