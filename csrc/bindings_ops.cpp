// The ops' loops over matrices, for numpy arrays.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "bag_pool.h"
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
    throw std::invalid_argument(std::string("bag_pool: ") + what + " has " +
                                std::to_string(array->size()) + " values; wanted " +
                                std::to_string(size) + ", contiguous");
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
                                " dimensions; wanted [P, B, D] whose rows are packed");
  }
  return {x.data(), x.shape(0), x.shape(1), x.shape(2), x.strides(0) / kSize, x.strides(1) / kSize};
}

template <typename T>
void pool_bags(const Array<T>& x, Optional<T> mean, Optional<T> distance, Optional<T> norm,
               Optional<T> dot, int num_threads) {
  const Bags<T> bags = bags_of(x);
  const int64_t rows = bags.patches * bags.batch;
  const BagStatistics<T> out = {output("mean", mean, bags.batch * bags.dim),
                                output("distance", distance, bags.batch),
                                output("norm", norm, rows), output("dot", dot, rows)};
  if (out.mean == nullptr || (out.norm == nullptr) != (out.dot == nullptr)) {
    throw std::invalid_argument("bag_pool: wanted mean, and both of norm and dot or none");
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
  const BagGradient<T> gradient = {input("dmean", dmean, values),
                                   input("mean", mean, values),
                                   input("of_x", of_x, rows),
                                   input("of_mean", of_mean, rows),
                                   input("weight", weight, rows),
                                   input("direction", direction, bags.batch),
                                   input("unit_scale", unit_scale, bags.batch)};
  const bool cosine = gradient.weight != nullptr;
  if (gradient.dmean == nullptr || gradient.mean == nullptr ||
      cosine != (gradient.of_mean != nullptr) || cosine != (gradient.direction != nullptr) ||
      cosine != (gradient.unit_scale != nullptr)) {
    throw std::invalid_argument("bag_pool_backward: a factor is missing");
  }
  Optional<T> target = dx;
  T* out = output("dx", target, rows * bags.dim);
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

}  // namespace

void register_ops(py::module_& m) {
  register_bag_pool<float>(m);
  register_bag_pool<double>(m);
}

}  // namespace bagssl
