// The ops' loops over matrices, for numpy arrays.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bag_pool.h"
#include "patch_grid.h"
#include "patch_rows.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace bagssl {
namespace {

template <typename T>
using Array = py::array_t<T>;
template <typename T>
using Optional = std::optional<py::array_t<T>>;

/// The address of a contiguous array of `size` values, null for none.
template <typename T>
const T* input(const char* what, const Optional<T>& array, int64_t size) {
  if (!array) return nullptr;
  if (array->size() != size || (array->flags() & py::array::c_style) == 0) {
    throw std::invalid_argument(std::string(what) + " has " + std::to_string(array->size()) +
                                " values; expected " + std::to_string(size) + ", contiguous");
  }
  return array->data();
}

template <typename T>
T* output(const char* what, Optional<T>& array, int64_t size) {
  if (input<T>(what, array, size) == nullptr) return nullptr;
  return array->mutable_data();
}

template <typename T>
Bags<T> bags_of(const Array<T>& x) {
  constexpr auto kSize = static_cast<py::ssize_t>(sizeof(T));
  if (x.ndim() != 3 || (x.shape(2) > 1 && x.strides(2) != kSize)) {
    throw std::invalid_argument("bag_pool: x has " + std::to_string(x.ndim()) +
                                " dimensions; expected [P, B, D] whose rows are packed");
  }
  return {x.data(), x.shape(0), x.shape(1), x.shape(2), x.strides(0) / kSize, x.strides(1) / kSize};
}

template <typename T>
void pool_bags(const Array<T>& x, Optional<T> mean, Optional<T> distance, Optional<T> norm,
               Optional<T> dot, int num_threads) {
  const Bags<T> bags = bags_of(x);
  const int64_t rows = bags.patches * bags.batch;
  const BagStatistics<T> out = {output("bag_pool: mean", mean, bags.batch * bags.dim),
                                output("bag_pool: distance", distance, bags.batch),
                                output("bag_pool: norm", norm, rows),
                                output("bag_pool: dot", dot, rows)};
  if (out.mean == nullptr || (out.norm == nullptr) != (out.dot == nullptr)) {
    throw std::invalid_argument("bag_pool: expected mean, and both of norm and dot or none");
  }
  py::gil_scoped_release release;
  bag_pool(bags, out, shared_pool(num_threads));
}

template <typename T>
void pool_bags_backward(const Array<T>& x, Array<T> dx, const Optional<T>& dmean,
                        const Optional<T>& mean, const Optional<T>& of_x,
                        const Optional<T>& of_mean, const Optional<T>& weight,
                        const Optional<T>& direction, const Optional<T>& unit_scale,
                        int num_threads) {
  const Bags<T> bags = bags_of(x);
  const int64_t rows = bags.patches * bags.batch, values = bags.batch * bags.dim;
  const BagGradient<T> gradient = {input("bag_pool: dmean", dmean, values),
                                   input("bag_pool: mean", mean, values),
                                   input("bag_pool: of_x", of_x, rows),
                                   input("bag_pool: of_mean", of_mean, rows),
                                   input("bag_pool: weight", weight, rows),
                                   input("bag_pool: direction", direction, bags.batch),
                                   input("bag_pool: unit_scale", unit_scale, bags.batch)};
  const bool cosine = gradient.weight != nullptr;
  if (gradient.dmean == nullptr || gradient.mean == nullptr ||
      cosine != (gradient.of_mean != nullptr) || cosine != (gradient.direction != nullptr) ||
      cosine != (gradient.unit_scale != nullptr)) {
    throw std::invalid_argument("bag_pool_backward: a factor is missing");
  }
  Optional<T> target = dx;
  T* out = output("bag_pool: dx", target, rows * bags.dim);
  py::gil_scoped_release release;
  bag_pool_backward(bags, gradient, out, shared_pool(num_threads));
}

template <typename T>
void register_bag_pool(py::module_& m) {
  const auto none = py::none();
  m.def("bag_pool", &pool_bags<T>, py::arg("x").noconvert(), py::kw_only(),
        py::arg("mean").noconvert(), py::arg("distance").noconvert() = none,
        py::arg("norm").noconvert() = none, py::arg("dot").noconvert() = none,
        py::arg("num_threads") = 0,
        "x [P, B, D] -> writes mean [B, D] and, where given, distance [B], norm and dot [P, B].");
  m.def("bag_pool_backward", &pool_bags_backward<T>, py::arg("x").noconvert(), py::kw_only(),
        py::arg("dx").noconvert(), py::arg("dmean").noconvert(), py::arg("mean").noconvert(),
        py::arg("of_x").noconvert() = none, py::arg("of_mean").noconvert() = none,
        py::arg("weight").noconvert() = none, py::arg("direction").noconvert() = none,
        py::arg("unit_scale").noconvert() = none, py::arg("num_threads") = 0,
        "Writes dx [P, B, D]; the factors are those of csrc/bag_pool.h.");
}

/// Cosines [D, half + 1], sines [D, half], distance [count], sign [count].
template <typename T>
using Axis = std::tuple<Array<T>, Array<T>, Array<int64_t>, Array<T>>;

template <typename T>
PatchAxis<T> axis_of(const Axis<T>& axis) {
  const auto& [cosines, sines, distance, sign] = axis;
  if (cosines.ndim() != 2 || cosines.shape(1) < 1) {
    throw std::invalid_argument("patch_grid: cosines are no matrix [distances, half + 1]");
  }
  const int64_t distances = cosines.shape(0), half = cosines.shape(1) - 1, count = distance.size();
  PatchAxis<T> out = {count,
                      half,
                      distances,
                      input<T>("patch_grid: cosines", cosines, distances * (half + 1)),
                      input<T>("patch_grid: sines", sines, distances * half),
                      input<int64_t>("patch_grid: distance", distance, count),
                      input<T>("patch_grid: sign", sign, count)};
  for (int64_t i = 0; i < count; ++i) {
    if (out.distance[i] < 0 || out.distance[i] >= distances) {
      throw std::invalid_argument("patch_grid: distance number " + std::to_string(out.distance[i]) +
                                  " of " + std::to_string(distances));
    }
  }
  return out;
}

/// The grid of pixels [B, F, V, 2, C], slots [T, L] and results [P, B, M].
template <typename T>
PatchGrid<T> grid_of(const Array<T>& pixels, const Axis<T>& down, const Axis<T>& across,
                     const Array<int64_t>& slots, const Array<T>& y) {
  constexpr auto kSize = static_cast<py::ssize_t>(sizeof(T));
  if (pixels.ndim() != 5 || y.ndim() != 3 || y.shape(1) != pixels.shape(0) ||
      (y.shape(2) > 1 && y.strides(2) != kSize)) {
    throw std::invalid_argument(
        "patch_grid: expected pixels [B, F, V, 2, C] and results [P, B, M] with packed rows");
  }
  PatchGrid<T> grid = {};
  grid.down = axis_of<T>(down);
  grid.across = axis_of<T>(across);
  grid.batch = pixels.shape(0);
  grid.channels = pixels.shape(4);
  grid.out_dim = y.shape(2);
  const int64_t frequencies = (grid.across.half + 1) * (2 * grid.down.half + 1);
  grid.pixels =
      input<T>("patch_grid: pixels", pixels, grid.batch * frequencies * 2 * grid.channels);
  grid.slots = input<int64_t>("patch_grid: slots", slots, grid.down.count * grid.across.count);
  for (int64_t i = 0; i < slots.size(); ++i) {
    if (grid.slots[i] < -1 || grid.slots[i] >= y.shape(0)) {
      throw std::invalid_argument("patch_grid: slot " + std::to_string(grid.slots[i]) + " of " +
                                  std::to_string(y.shape(0)));
    }
  }
  grid.patch_stride = y.strides(0) / kSize;
  grid.image_stride = y.strides(1) / kSize;
  return grid;
}

template <typename T>
int64_t weight_size(const PatchGrid<T>& grid) {
  return (grid.across.half + 1) * (2 * grid.down.half + 1) * 2 * grid.channels * grid.out_dim;
}

template <typename T>
void grid_forward(const Array<T>& pixels, const Axis<T>& down, const Axis<T>& across,
                  const Array<int64_t>& slots, const Array<T>& weight, const Optional<T>& bias,
                  bool relu, Array<T> y, int num_threads) {
  const PatchGrid<T> grid = grid_of(pixels, down, across, slots, y);
  const T* weight_data = input<T>("patch_grid: weight", weight, weight_size(grid));
  const T* bias_data = input("patch_grid: bias", bias, grid.out_dim);
  T* out = y.mutable_data();
  py::gil_scoped_release release;
  patch_grid(grid, weight_data, bias_data, relu, out, shared_pool(num_threads));
}

template <typename T>
void grid_backward(const Array<T>& pixels, const Axis<T>& down, const Axis<T>& across,
                   const Array<int64_t>& slots, const Array<T>& dy, const Optional<T>& y,
                   Array<T> dweight, Array<T> dbias, int num_threads) {
  const PatchGrid<T> grid = grid_of(pixels, down, across, slots, dy);
  for (int i = 0; y && i < 3; ++i) {
    if (y->ndim() != 3 || y->shape(i) != dy.shape(i) || y->strides(i) != dy.strides(i)) {
      throw std::invalid_argument("patch_grid_backward: y is not laid out as dy");
    }
  }
  Optional<T> weight_target = dweight, bias_target = dbias;
  T* weight_out = output("patch_grid: dweight", weight_target, weight_size(grid));
  T* bias_out = output("patch_grid: dbias", bias_target, grid.out_dim);
  const T* result = y ? y->data() : nullptr;
  py::gil_scoped_release release;
  patch_grid_backward(grid, dy.data(), result, weight_out, bias_out, shared_pool(num_threads));
}

template <typename T>
void register_patch_grid(py::module_& m) {
  m.def("patch_grid", &grid_forward<T>, py::arg("pixels").noconvert(), py::kw_only(),
        py::arg("down"), py::arg("across"), py::arg("slots").noconvert(),
        py::arg("weight").noconvert(), py::arg("bias").noconvert() = py::none(), py::arg("relu"),
        py::arg("y").noconvert(), py::arg("num_threads") = 0,
        "Writes y [P, B, M]; the operands are those of csrc/patch_grid.h.");
  m.def("patch_grid_backward", &grid_backward<T>, py::arg("pixels").noconvert(), py::kw_only(),
        py::arg("down"), py::arg("across"), py::arg("slots").noconvert(), py::arg("dy").noconvert(),
        py::arg("y").noconvert() = py::none(), py::arg("dweight").noconvert(),
        py::arg("dbias").noconvert(), py::arg("num_threads") = 0,
        "Adds to dweight [F, V, 2, C, M] and dbias [M].");
}

template <typename T>
void cut_patch_rows(const Array<uint8_t>& pixels, const Array<int64_t>& offsets, int64_t lines,
                    int64_t stride, int center, Array<T> out, int num_threads) {
  const int64_t count = offsets.size();
  Optional<T> target = out;
  if (lines < 1 || count < 1 || out.size() < 1 || lines > out.size() / count ||
      out.size() % (count * lines) != 0) {
    throw std::invalid_argument("patch_rows: expected patches of whole lines");
  }
  if (stride < 0 || stride > pixels.size()) {
    throw std::invalid_argument("patch_rows: the stride is " + std::to_string(stride) +
                                "; expected 0 or more, within the pixels");
  }
  const PatchRows rows = {input<uint8_t>("patch_rows: pixels", pixels, pixels.size()),
                          input<int64_t>("patch_rows: offsets", offsets, count),
                          count,
                          lines,
                          out.size() / (count * lines),
                          stride,
                          center};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t offset = rows.offsets[i], last = pixels.size() - rows.length;
    // Divided, as the product could overflow.
    if (offset < 0 || offset > last || (stride > 0 && lines - 1 > (last - offset) / stride)) {
      throw std::invalid_argument("patch_rows: patch " + std::to_string(i) +
                                  " lies outside of the pixels");
    }
  }
  T* data = output("patch_rows: out", target, out.size());
  py::gil_scoped_release release;
  patch_rows(rows, data, shared_pool(num_threads));
}

template <typename T>
void register_patch_rows(py::module_& m) {
  m.def("patch_rows", &cut_patch_rows<T>, py::arg("pixels").noconvert(), py::kw_only(),
        py::arg("offsets").noconvert(), py::arg("lines"), py::arg("stride"), py::arg("center"),
        py::arg("out").noconvert(), py::arg("num_threads") = 0,
        "Writes patches as rows of centered numbers; see csrc/patch_rows.h.");
}

}  // namespace

void register_ops(py::module_& m) {
  register_bag_pool<float>(m);
  register_bag_pool<double>(m);
  register_patch_grid<float>(m);
  register_patch_grid<double>(m);
  register_patch_rows<float>(m);
  register_patch_rows<double>(m);
}

}  // namespace bagssl
