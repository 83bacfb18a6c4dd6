// The 3x3 convolution, for numpy arrays.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "thread_pool.h"
#include "winograd.h"

namespace py = pybind11;

namespace bagssl {
namespace {

// No conversion: what comes must be what is read and written in place.
using Floats = py::array_t<float, 0>;

/// The shape of maps [N, H, W, C], which must be packed.
void check_maps(const char* name, const Floats& maps, int64_t channels) {
  const bool packed = maps.ndim() == 4 && (maps.flags() & py::array::c_style) != 0;
  if (!packed || maps.shape(3) != channels) {
    throw std::invalid_argument(std::string("conv3x3: ") + name + " is " +
                                std::string(py::str(py::cast<py::tuple>(maps.attr("shape")))) +
                                "; expected packed float32 [N, H, W, " + std::to_string(channels) +
                                "]");
  }
}

WeightStrides weight_strides(const Floats& weight) {
  const auto stride = [&](int i) { return static_cast<int64_t>(weight.strides(i)) / 4; };
  if (weight.ndim() != 4 || weight.shape(2) != 3 || weight.shape(3) != 3 ||
      stride(2) != 3 * stride(3)) {
    throw std::invalid_argument("conv3x3: weight is " +
                                std::string(py::str(py::cast<py::tuple>(weight.attr("shape")))) +
                                "; expected float32 [K, C, 3, 3], contiguous or channels-last");
  }
  return {stride(0), stride(1), stride(3)};
}

using Convolution = void (*)(const float*, const float*, float*, const ConvShape&, WeightStrides,
                             ThreadPool&);

void run(Convolution convolution, const float* a, const float* b, float* out, const Floats& x,
         const Floats& y, const Floats& weight, int num_threads) {
  check_maps("x", x, weight.ndim() > 1 ? weight.shape(1) : 0);
  check_maps("y", y, weight.ndim() > 0 ? weight.shape(0) : 0);
  for (int i = 0; i < 3; ++i) {
    if (x.shape(i) != y.shape(i)) {
      throw std::invalid_argument("conv3x3: x and y are maps of different sizes");
    }
  }
  const ConvShape shape{x.shape(0), x.shape(1), x.shape(2), x.shape(3), y.shape(3)};
  const WeightStrides strides = weight_strides(weight);
  py::gil_scoped_release release;
  ThreadPool alone(1);  // a plain loop, which waits for nobody else's
  convolution(a, b, out, shape, strides, num_threads == 1 ? alone : shared_pool(num_threads));
}

void forward(const Floats& x, const Floats& weight, Floats y, int num_threads) {
  run(conv3x3, x.data(), weight.data(), y.mutable_data(), x, y, weight, num_threads);
}

void backward_x(const Floats& dy, const Floats& weight, Floats dx, int num_threads) {
  run(conv3x3_dx, dy.data(), weight.data(), dx.mutable_data(), dx, dy, weight, num_threads);
}

void backward_weight(const Floats& x, const Floats& dy, Floats dweight, int num_threads) {
  run(conv3x3_dweight, x.data(), dy.data(), dweight.mutable_data(), x, dy, dweight, num_threads);
}

}  // namespace

void register_conv(py::module_& m) {
  m.def("conv3x3", &forward, py::arg("x").noconvert(), py::arg("weight").noconvert(),
        py::arg("y").noconvert(), py::arg("num_threads"),
        "y [N, H, W, K] from x [N, H, W, C] and weight [K, C, 3, 3].");
  m.def("conv3x3_dx", &backward_x, py::arg("dy").noconvert(), py::arg("weight").noconvert(),
        py::arg("dx").noconvert(), py::arg("num_threads"), "dx from dy and weight.");
  m.def("conv3x3_dweight", &backward_weight, py::arg("x").noconvert(), py::arg("dy").noconvert(),
        py::arg("dweight").noconvert(), py::arg("num_threads"), "dweight from x and dy.");
}

}  // namespace bagssl
