#include "bindings_parse.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace bagssl {
namespace {

std::string type_name(const py::handle& object) {
  return py::type::of(object).attr("__name__").cast<std::string>();
}

/// A field of a Python `Augment`.
template <typename T>
T field(const py::handle& augment, const char* name, const char* expected) {
  if (!py::hasattr(augment, name)) {
    throw py::type_error("augment must be an Augment, got an object of type " + type_name(augment));
  }
  const py::object value = augment.attr(name);
  try {
    return value.cast<T>();
  } catch (const py::cast_error&) {
    throw py::value_error(std::string("augment: ") + name + " must be " + expected + ", got " +
                          py::repr(value).cast<std::string>());
  }
}

double number(const py::handle& augment, const char* name) {
  return field<double>(augment, name, "a number");
}

void pair(const py::handle& augment, const char* name, double (&out)[2]) {
  const auto ends = field<std::array<double, 2>>(augment, name, "two numbers (lowest, highest)");
  out[0] = ends[0];
  out[1] = ends[1];
}

void triple(const py::handle& augment, const char* name, float (&out)[3]) {
  const auto values = field<std::array<float, 3>>(augment, name, "three numbers, one per channel");
  for (int c = 0; c < 3; ++c) out[c] = values[c];
}

}  // namespace

std::string shape_text(const py::array& array) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    text += (i != 0 ? ", " : "") + std::to_string(array.shape(i));
  }
  return text + "]";
}

std::string describe(const py::object& object) {
  if (!py::isinstance<py::array>(object)) return "an object of type " + type_name(object);
  const auto array = py::reinterpret_borrow<py::array>(object);
  return "an array of type " + py::str(array.dtype()).cast<std::string>() + " and shape " +
         shape_text(array);
}

std::string exception_text(const py::error_already_set& error) {
  const auto name = error.type().attr("__name__").cast<std::string>();
  const auto text = py::reinterpret_steal<py::object>(PyObject_Str(error.value().ptr()));
  // Names of files may be in any encoding.
  const auto encoded = py::reinterpret_steal<py::object>(
      text ? PyUnicode_AsEncodedString(text.ptr(), "utf-8", "backslashreplace") : nullptr);
  PyErr_Clear();
  return encoded && py::len(encoded) > 0 ? name + ": " + std::string(py::bytes(encoded)) : name;
}

DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBfloat16;
  if (name == "float16") return DType::kFloat16;
  if (name == "uint8") return DType::kUint8;
  throw py::value_error("dtype must be one of float32, bfloat16, float16, uint8, got '" + name +
                        "'");
}

Interpolation parse_interpolation(const std::string& name) {
  if (name == "bilinear") return Interpolation::kBilinear;
  if (name == "bicubic") return Interpolation::kBicubic;
  throw py::value_error("interpolation must be one of bilinear, bicubic, got '" + name + "'");
}

AugmentSpec parse_augment(const py::handle& augment) {
  AugmentSpec spec;
  pair(augment, "scale", spec.scale);
  pair(augment, "ratio", spec.ratio);
  spec.hflip = number(augment, "hflip");
  spec.brightness = number(augment, "brightness");
  spec.contrast = number(augment, "contrast");
  spec.saturation = number(augment, "saturation");
  spec.hue = number(augment, "hue");
  spec.jitter_prob = number(augment, "jitter_prob");
  spec.grayscale_prob = number(augment, "grayscale_prob");
  spec.blur_prob = number(augment, "blur_prob");
  pair(augment, "blur_sigma", spec.blur_sigma);
  spec.solarize_prob = number(augment, "solarize_prob");
  spec.solarize_threshold = number(augment, "solarize_threshold");
  check_spec(spec);
  return spec;
}

std::vector<AugmentSpec> parse_augments(const py::sequence& augments) {
  std::vector<AugmentSpec> specs;
  for (const py::handle augment : augments) specs.push_back(parse_augment(augment));
  if (specs.empty()) throw py::value_error("augments must hold at least one Augment, got none");
  return specs;
}

ViewOptions parse_view_options(const py::handle& augment, DType dtype) {
  ViewOptions options;
  options.out_h = options.out_w = field<int>(augment, "size", "an integer");
  options.interp =
      parse_interpolation(field<std::string>(augment, "interpolation", "bilinear or bicubic"));
  options.blur_kernel = field<int>(augment, "blur_kernel", "an integer");
  triple(augment, "mean", options.mean);
  triple(augment, "std", options.std);
  options.dtype = dtype;
  check_options(options);
  return options;
}

std::shared_ptr<py::object> shared_object(py::object object) {
  return {new py::object(std::move(object)), [](py::object* held) {
            // A thread that was left behind may outlive the interpreter: the object is then gone.
            if (Py_IsInitialized() == 0) return;
            py::gil_scoped_acquire gil;
            delete held;
          }};
}

FallbackDecoder fallback_decoder(py::object decoder) {
  if (decoder.is_none()) return {};
  std::shared_ptr<py::object> held = shared_object(std::move(decoder));
  return [held](const uint8_t* data, size_t size, int64_t max_pixels, ByteBuffer& pixels) {
    py::gil_scoped_acquire gil;
    try {
      const auto file = py::memoryview::from_memory(data, static_cast<py::ssize_t>(size));
      const Bytes image((*held)(file, max_pixels));
      if (image.ndim() != 3 || image.shape(2) != 3) {
        throw std::runtime_error("the decoder did not return uint8 [H, W, 3]");
      }
      std::copy_n(image.data(), image.size(), pixels.take(static_cast<size_t>(image.size())));
      return ImageSize{image.shape(0), image.shape(1)};
    } catch (py::error_already_set& error) {
      throw std::runtime_error(py::str(error.value()).cast<std::string>());
    }
  };
}

}  // namespace bagssl
