#include "patch_grid.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <vector>

namespace bagssl {
namespace {

template <typename T>
constexpr int64_t kWidth = 64 / sizeof(T);  // columns of a tile: a cache line

/// What a thread keeps beside the operands, in lines of kWidth values, in the cache.
template <typename T>
struct TileScratch {
  int64_t weight_lines;
  T* weight;                   // [F, V, 2, C]: the tile's, or its gradient
  T* rows;                     // [image, T, 2, F]: spectra across of every row of patches
  T *even, *odd;               // [image, 2, half + 1] and [image, 2, half]: sums, differences
  T *cosine_sums, *sine_sums;  // [2, distances]
};

}  // namespace
}  // namespace bagssl

#define BAGSSL_BODY "patch_grid_body.h"
#include "simd_levels.h"

namespace bagssl {
namespace {

/// The scratch of one thread and its memory.
template <typename T>
class Workspace {
 public:
  explicit Workspace(const PatchGrid<T>& grid) {
    const PatchAxis<T>&down = grid.down, &across = grid.across;
    const int64_t weight = (across.half + 1) * (2 * down.half + 1) * 2 * grid.channels;
    const int64_t rows = 4 * down.count * (across.half + 1);
    const int64_t even = 4 * (down.half + 1), odd = 4 * down.half;
    const int64_t sums = std::max(2 * down.distances, across.distances);
    const int64_t lines = weight + rows + even + odd + 2 * sums + 1;
    memory_.resize(lines * kWidth<T>);
    void* start = memory_.data();
    size_t space = memory_.size() * sizeof(T);
    T* next = static_cast<T*>(std::align(64, 64, start, space));
    const auto take = [&](int64_t count) {
      T* taken = next;
      next += count * kWidth<T>;
      return taken;
    };
    scratch_ = {weight, take(weight), take(rows), take(even), take(odd), take(sums), take(sums)};
  }
  const TileScratch<T>& scratch() const { return scratch_; }

 private:
  std::vector<T> memory_;
  TileScratch<T> scratch_;
};

/// work(first column, number of columns, scratch) for every tile.
template <typename T, typename Work>
void for_each_tile(const PatchGrid<T>& grid, ThreadPool& pool, const Work& work) {
  const int64_t tiles = (grid.out_dim + kWidth<T> - 1) / kWidth<T>;
  std::vector<std::unique_ptr<Workspace<T>>> spaces(pool.size());
  pool.parallel_for(tiles, [&](int worker, int64_t tile) {
    std::unique_ptr<Workspace<T>>& space = spaces[worker];
    if (space == nullptr) space = std::make_unique<Workspace<T>>(grid);
    const int64_t first = tile * kWidth<T>;
    work(first, std::min(kWidth<T>, grid.out_dim - first), space->scratch());
  });
}

}  // namespace

template <typename T>
void patch_grid(const PatchGrid<T>& grid, const T* weight, const T* bias, bool relu, T* y,
                ThreadPool& pool) {
  const auto tile = BAGSSL_PICK(forward_tile<T>);
  for_each_tile(grid, pool, [&](int64_t first, int64_t columns, const TileScratch<T>& scratch) {
    tile(grid, weight + first, bias == nullptr ? nullptr : bias + first, relu, y + first, columns,
         scratch);
  });
}

template <typename T>
void patch_grid_backward(const PatchGrid<T>& grid, const T* dy, const T* y, T* dweight, T* dbias,
                         ThreadPool& pool) {
  const auto tile = BAGSSL_PICK(backward_tile<T>);
  for_each_tile(grid, pool, [&](int64_t first, int64_t columns, const TileScratch<T>& scratch) {
    tile(grid, dy + first, y == nullptr ? nullptr : y + first, dweight + first, dbias + first,
         columns, scratch);
  });
}

template void patch_grid(const PatchGrid<float>&, const float*, const float*, bool, float*,
                         ThreadPool&);
template void patch_grid(const PatchGrid<double>&, const double*, const double*, bool, double*,
                         ThreadPool&);
template void patch_grid_backward(const PatchGrid<float>&, const float*, const float*, float*,
                                  float*, ThreadPool&);
template void patch_grid_backward(const PatchGrid<double>&, const double*, const double*, double*,
                                  double*, ThreadPool&);

}  // namespace bagssl
