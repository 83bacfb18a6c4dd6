// The blocks of convolutional networks, for numpy arrays.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "add_relu.h"
#include "conv_bn_relu.h"
#include "relu_mean.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace bagssl {
namespace {

// No conversion: what comes must be what is read and written in place.
template <typename Number>
using Array = py::array_t<Number, 0>;
template <typename Number>
using OptionalArray = std::optional<Array<Number>>;
using Floats = Array<float>;
using Optional = OptionalArray<float>;

[[noreturn]] void refuse(const char* name, const py::array& array, const std::string& expected) {
  throw std::invalid_argument(std::string("conv_bn_relu: ") + name + " is " +
                              std::string(py::str(py::cast<py::tuple>(array.attr("shape")))) +
                              "; expected packed " + expected);
}

bool is_packed(const py::array& array, int dims) {
  return array.ndim() == dims && (array.flags() & py::array::c_style) != 0;
}

void check_maps(const char* name, const py::array& maps, int64_t n, int64_t height, int64_t width,
                int64_t channels) {
  if (!is_packed(maps, 4) || maps.shape(0) != n || maps.shape(1) != height ||
      maps.shape(2) != width || maps.shape(3) != channels) {
    refuse(name, maps,
           "[" + std::to_string(n) + ", " + std::to_string(height) + ", " + std::to_string(width) +
               ", " + std::to_string(channels) + "]");
  }
}

const float* values(const char* name, const Optional& array, int64_t size) {
  if (!array) return nullptr;
  if (!is_packed(*array, 1) || array->size() != size) {
    refuse(name, *array, "[" + std::to_string(size) + "]");
  }
  return array->data();
}

float* values_out(const char* name, Optional& array, int64_t size) {
  return values(name, array, size) ? array->mutable_data() : nullptr;
}

template <typename Number>
MapsOf<Number> deferred(const Array<Number>& x, const Optional& center, const Optional& scale,
                        const Optional& shift) {
  if (!is_packed(x, 4)) refuse("x", x, "[N, H, W, C]");
  if (center.has_value() != scale.has_value() || scale.has_value() != shift.has_value()) {
    throw std::invalid_argument("conv_bn_relu: expected all of center, scale and shift, or none");
  }
  const int64_t channels = x.shape(3);
  return {x.data(), values("center", center, channels), values("scale", scale, channels),
          values("shift", shift, channels)};
}

ConvGeometry geometry_of(const py::array& x, const Floats& weight, int64_t stride,
                         int64_t padding) {
  const bool fits = weight.ndim() == 4 && weight.shape(1) == x.shape(3) && weight.shape(2) > 0 &&
                    weight.shape(3) > 0 && weight.size() > 0;
  if (!fits) refuse("weight", weight, "[M, " + std::to_string(x.shape(3)) + ", h, w]");
  ConvGeometry s{x.shape(0),      x.shape(1),      x.shape(2),      x.shape(3), 0,      0,
                 weight.shape(0), weight.shape(2), weight.shape(3), stride,     padding};
  const int64_t down = s.height + 2 * padding - s.kernel_height;
  const int64_t across = s.width + 2 * padding - s.kernel_width;
  if (stride < 1 || padding < 0 || down < 0 || across < 0) {
    throw std::invalid_argument("conv_bn_relu: stride " + std::to_string(stride) + " and padding " +
                                std::to_string(padding) + " do not fit the maps and the kernel");
  }
  s.out_height = down / stride + 1;
  s.out_width = across / stride + 1;
  return s;
}

KernelStrides strides_of(const Floats& weight) {
  const auto stride = [&](int i) { return static_cast<int64_t>(weight.strides(i)) / 4; };
  return {stride(0), stride(1), stride(2), stride(3)};
}

/// Calls work(pool) without the GIL.
template <typename Work>
void without_gil(int num_threads, Work work) {
  py::gil_scoped_release release;
  ThreadPool alone(1);  // a plain loop, which waits for nobody else's
  work(num_threads == 1 ? alone : shared_pool(num_threads));
}

template <typename Number>
void forward(const Array<Number>& x, const Optional& center, const Optional& scale,
             const Optional& shift, const Floats& weight, int64_t stride, int64_t padding,
             Array<Number> y, Optional mean, Optional var, int num_threads) {
  const MapsOf<Number> maps = deferred(x, center, scale, shift);
  const ConvGeometry s = geometry_of(x, weight, stride, padding);
  check_maps("y", y, s.n, s.out_height, s.out_width, s.out_channels);
  Number* to = y.mutable_data();
  float *of_mean = values_out("mean", mean, s.out_channels),
        *of_var = values_out("var", var, s.out_channels);
  if ((of_mean == nullptr) != (of_var == nullptr)) {
    throw std::invalid_argument("conv_bn_relu: expected both of mean and var, or neither");
  }
  const KernelStrides strides = strides_of(weight);
  const float* taps = weight.data();
  without_gil(num_threads, [&](ThreadPool& pool) {
    conv_forward(maps, taps, strides, s, to, of_mean, of_var, pool);
  });
}

template <typename Number>
void backward(const Array<Number>& dy, const Array<Number>& y, const Optional& mean,
              const Optional& dmean, const Optional& dvar, const Array<Number>& x,
              const Optional& center, const Optional& scale, const Optional& shift,
              const Floats& weight, int64_t stride, int64_t padding, OptionalArray<Number> dx,
              Optional dscale, Optional dshift, Optional dweight, int num_threads) {
  const MapsOf<Number> maps = deferred(x, center, scale, shift);
  const ConvGeometry s = geometry_of(x, weight, stride, padding);
  check_maps("dy", dy, s.n, s.out_height, s.out_width, s.out_channels);
  check_maps("y", y, s.n, s.out_height, s.out_width, s.out_channels);
  if (dx) check_maps("dx", *dx, s.n, s.height, s.width, s.channels);
  const KernelStrides strides = strides_of(weight);
  for (int i = 0; dweight && i < 4; ++i) {
    if (dweight->ndim() != 4 || dweight->shape(i) != weight.shape(i)) {
      refuse("dweight", *dweight, "as weight has it");
    }
  }
  const GradientOf<Number> gradient{dy.data(), y.data(), values("mean", mean, s.out_channels),
                                    values("dmean", dmean, s.out_channels),
                                    values("dvar", dvar, s.out_channels)};
  if ((gradient.dmean == nullptr) != (gradient.dvar == nullptr) ||
      (gradient.dmean && !gradient.mean)) {
    throw std::invalid_argument("conv_bn_relu: expected all of mean, dmean and dvar, or none");
  }
  const ResultsOf<Number> results{
      dx ? dx->mutable_data() : nullptr, values_out("dscale", dscale, s.channels),
      values_out("dshift", dshift, s.channels), dweight ? dweight->mutable_data() : nullptr,
      strides_of(dweight ? *dweight : weight)};
  if (results.dx && maps.scale && !(results.dscale && results.dshift)) {
    throw std::invalid_argument("conv_bn_relu: dx of a deferred x comes with dscale and dshift");
  }
  const float* taps = weight.data();
  without_gil(num_threads, [&](ThreadPool& pool) {
    conv_backward(gradient, maps, taps, strides, s, results, pool);
  });
}

template <typename Number>
void mean_of(const Array<Number>& x, const Floats& center, const Floats& scale, const Floats& shift,
             Floats means, int num_threads) {
  const MapsOf<Number> maps = deferred(x, center, scale, shift);
  const int64_t n = x.shape(0), channels = x.shape(3);
  if (!is_packed(means, 2) || means.shape(0) != n || means.shape(1) != channels) {
    refuse("means", means, "[" + std::to_string(n) + ", " + std::to_string(channels) + "]");
  }
  const int64_t pixels = x.shape(1) * x.shape(2);
  float* to = means.mutable_data();
  without_gil(num_threads,
              [&](ThreadPool& pool) { relu_mean(maps, n, pixels, channels, to, pool); });
}

template <typename Number>
void mean_backward(const Floats& dmeans, const Array<Number>& x, const Floats& center,
                   const Floats& scale, const Floats& shift, Array<Number> dx, Floats dscale,
                   Floats dshift, int num_threads) {
  const MapsOf<Number> maps = deferred(x, center, scale, shift);
  const int64_t n = x.shape(0), pixels = x.shape(1) * x.shape(2), channels = x.shape(3);
  if (!is_packed(dmeans, 2) || dmeans.shape(0) != n || dmeans.shape(1) != channels) {
    refuse("dmeans", dmeans, "[" + std::to_string(n) + ", " + std::to_string(channels) + "]");
  }
  check_maps("dx", dx, n, x.shape(1), x.shape(2), channels);
  Optional of_scale = dscale, of_shift = dshift;
  float *to_scale = values_out("dscale", of_scale, channels),
        *to_shift = values_out("dshift", of_shift, channels);
  Number* to = dx.mutable_data();
  const float* from = dmeans.data();
  without_gil(num_threads, [&](ThreadPool& pool) {
    relu_mean_backward(from, maps, n, pixels, channels, to, to_scale, to_shift, pool);
  });
}

/// Packed maps of one shape, and the activation that identity is.
template <typename Number>
struct Sum {
  MapsOf<Number> x;
  Identity<Number> identity;
  int64_t rows, channels;
};

template <typename Number>
Sum<Number> sum_of(const Array<Number>& y, const Optional& center, const Optional& scale,
                   const Optional& shift, const Array<Number>& identity,
                   const Optional& identity_center, const Optional& identity_scale,
                   const Optional& identity_shift, bool relu) {
  const Sum<Number> sum{deferred(y, center, scale, shift),
                        {deferred(identity, identity_center, identity_scale, identity_shift), relu},
                        y.shape(0) * y.shape(1) * y.shape(2),
                        y.shape(3)};
  if (!sum.x.scale) throw std::invalid_argument("add_relu: expected center, scale and shift of y");
  check_maps("identity", identity, y.shape(0), y.shape(1), y.shape(2), y.shape(3));
  return sum;
}

template <typename Number>
void add(const Array<Number>& y, const Optional& center, const Optional& scale,
         const Optional& shift, const Array<Number>& identity, const Optional& identity_center,
         const Optional& identity_scale, const Optional& identity_shift, bool relu,
         Array<Number> out, int num_threads) {
  const Sum<Number> sum = sum_of(y, center, scale, shift, identity, identity_center, identity_scale,
                                 identity_shift, relu);
  check_maps("out", out, y.shape(0), y.shape(1), y.shape(2), y.shape(3));
  Number* to = out.mutable_data();
  without_gil(num_threads, [&](ThreadPool& pool) {
    add_relu(sum.x, sum.identity, sum.rows, sum.channels, to, pool);
  });
}

template <typename Number>
void add_backward(const Array<Number>& dout, const Array<Number>& out, const Array<Number>& y,
                  const Optional& center, const Optional& scale, const Optional& shift,
                  const Array<Number>& identity, const Optional& identity_center,
                  const Optional& identity_scale, const Optional& identity_shift, bool relu,
                  Array<Number> dy, Optional dscale, Optional dshift, Array<Number> didentity,
                  Optional didentity_scale, Optional didentity_shift, int num_threads) {
  const Sum<Number> sum = sum_of(y, center, scale, shift, identity, identity_center, identity_scale,
                                 identity_shift, relu);
  const auto check = [&](const char* name, const Array<Number>& maps) {
    check_maps(name, maps, y.shape(0), y.shape(1), y.shape(2), y.shape(3));
  };
  check("dout", dout);
  check("out", out);
  check("dy", dy);
  check("didentity", didentity);
  const AddReluResults<Number> results{
      dy.mutable_data(),
      didentity.mutable_data(),
      values_out("dscale", dscale, sum.channels),
      values_out("dshift", dshift, sum.channels),
      values_out("didentity_scale", didentity_scale, sum.channels),
      values_out("didentity_shift", didentity_shift, sum.channels)};
  const bool of_identity = results.didentity_scale && results.didentity_shift;
  if (!results.dscale || !results.dshift || (sum.identity.maps.scale && !of_identity)) {
    throw std::invalid_argument("add_relu: each scale and shift needs a gradient");
  }
  const Number *from = dout.data(), *activation = out.data();
  without_gil(num_threads, [&](ThreadPool& pool) {
    add_relu_backward(from, activation, sum.x, sum.identity, sum.rows, sum.channels, results, pool);
  });
}

}  // namespace

template <typename Number>
void register_for(py::module_& m) {
  const auto in = [](const char* name) { return py::arg(name).noconvert(); };
  m.def("conv_bn_relu", &forward<Number>, in("x"), in("center"), in("scale"), in("shift"),
        in("weight"), py::arg("stride"), py::arg("padding"), in("y"), in("mean"), in("var"),
        py::arg("num_threads"),
        "y [N, H', W', M] and its moments [M], of the activation of x [N, H, W, C].");
  m.def("conv_bn_relu_backward", &backward<Number>, in("dy"), in("y"), in("mean"), in("dmean"),
        in("dvar"), in("x"), in("center"), in("scale"), in("shift"), in("weight"),
        py::arg("stride"), py::arg("padding"), in("dx"), in("dscale"), in("dshift"), in("dweight"),
        py::arg("num_threads"), "What is not None of dx, dscale, dshift and dweight.");
  m.def("relu_mean", &mean_of<Number>, in("x"), in("center"), in("scale"), in("shift"), in("means"),
        py::arg("num_threads"), "Means [N, C] of the activation of x [N, H, W, C].");
  m.def("relu_mean_backward", &mean_backward<Number>, in("dmeans"), in("x"), in("center"),
        in("scale"), in("shift"), in("dx"), in("dscale"), in("dshift"), py::arg("num_threads"),
        "Gradients of x, scale and shift from those of the means.");
  m.def("add_relu", &add<Number>, in("y"), in("center"), in("scale"), in("shift"), in("identity"),
        in("identity_center"), in("identity_scale"), in("identity_shift"), py::arg("relu"),
        in("out"), py::arg("num_threads"),
        "relu(normalized y + identity) [N, H, W, C]; identity may be normalized, with its relu.");
  m.def("add_relu_backward", &add_backward<Number>, in("dout"), in("out"), in("y"), in("center"),
        in("scale"), in("shift"), in("identity"), in("identity_center"), in("identity_scale"),
        in("identity_shift"), py::arg("relu"), in("dy"), in("dscale"), in("dshift"),
        in("didentity"), in("didentity_scale"), in("didentity_shift"), py::arg("num_threads"),
        "Gradients of y and identity, and of the scale and shift of each that has them.");
}

void register_blocks(py::module_& m) {
  register_for<float>(m);
  register_for<BFloat16>(m);  // as numpy's uint16
}

}  // namespace bagssl
