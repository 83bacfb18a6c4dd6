#pragma once

#include <cstdint>

#include "thread_pool.h"

namespace bagssl {

/// Where patches lie along one axis, seen from the center: position i is `sign[i]` times distance
/// number `distance[i]`. Waves have an odd length and so `half` frequencies beside zero.
template <typename T>
struct PatchAxis {
  int64_t count, half, distances;
  const T* cosines;         // [distances, half + 1]
  const T* sines;           // [distances, half]: without frequency zero
  const int64_t* distance;  // [count]
  const T* sign;            // [count]
};

/// A linear layer over patches at combinations of positions `down` and `across`, by two
/// dimensional spectra of pixels and weight: their product, summed over channels and transformed
/// back where a patch lies, is the layer's result. Frequencies f across are 0 .. half, frequencies
/// v down are 0, 1, -1, 2, -2, ..: F and V many; values are real and imaginary parts.
///
/// What scales the transform back is in `across`, and `across.sines` are negative.
template <typename T>
struct PatchGrid {
  PatchAxis<T> down, across;
  int64_t batch, channels, out_dim;
  const T* pixels;                     // [B, F, V, 2, C]
  const int64_t* slots;                // [T, L]: which p of the result it is, -1 for none
  int64_t patch_stride, image_stride;  // of results [P, B, M], rows packed
};

/// y [P, B, M] from weight [F, V, 2, C, M] (conjugate) and bias [M] or null.
template <typename T>
void patch_grid(const PatchGrid<T>& grid, const T* weight, const T* bias, bool relu, T* y,
                ThreadPool& pool);

/// Adds to dweight [F, V, 2, C, M] and dbias [M]. Where y is given, dy counts where y is positive.
template <typename T>
void patch_grid_backward(const PatchGrid<T>& grid, const T* dy, const T* y, T* dweight, T* dbias,
                         ThreadPool& pool);

}  // namespace bagssl
