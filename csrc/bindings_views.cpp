// Drawing tables of view parameters and cutting patches, for numpy arrays.

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings_parse.h"
#include "patch_views.h"
#include "philox.h"
#include "thread_pool.h"
#include "view_params.h"

namespace py = pybind11;

namespace bagssl {
namespace {

using Triple = std::array<float, 3>;

ViewOptions make_options(std::array<int, 2> size, const std::string& interpolation, int blur_kernel,
                         Triple mean, Triple std, const std::string& dtype) {
  ViewOptions options;
  options.out_h = size[0];
  options.out_w = size[1];
  options.blur_kernel = blur_kernel;
  for (int c = 0; c < 3; ++c) {
    options.mean[c] = mean[c];
    options.std[c] = std[c];
  }
  options.interp = parse_interpolation(interpolation);
  options.dtype = parse_dtype(dtype);
  check_options(options);
  return options;
}

using Sizes = py::array_t<int64_t, py::array::c_style>;

/// Fills a [patches, B, 16] table; make(p, b, height, width) gives one row.
template <typename Make>
py::array_t<float> fill_table(const char* what, const Sizes& sizes, int64_t patches, Make make) {
  if (sizes.ndim() != 2 || sizes.shape(1) != 2 || patches < 0) {
    throw std::invalid_argument(std::string(what) + ": sizes has shape " + shape_text(sizes) +
                                " and patches is " + std::to_string(patches) +
                                "; expected int64 [B, 2] (height, width) and patches >= 0");
  }
  const int64_t batch = sizes.shape(0);
  py::array_t<float> table({patches, batch, int64_t{kViewParams}});
  auto* rows = reinterpret_cast<ViewParams*>(table.mutable_data());
  const int64_t* size = sizes.data();
  py::gil_scoped_release release;
  for (int64_t p = 0; p < patches; ++p) {
    for (int64_t b = 0; b < batch; ++b) {
      rows[p * batch + b] = make(p, b, size[2 * b], size[2 * b + 1]);
    }
  }
  return table;
}

py::array_t<float> draw_views(const py::sequence& augments, const Sizes& sizes,
                              const py::array_t<int64_t, py::array::c_style>& images,
                              int64_t patches, uint64_t seed, uint64_t epoch) {
  const std::vector<AugmentSpec> specs = parse_augments(augments);
  if (images.ndim() != 1 || sizes.ndim() != 2 || images.shape(0) != sizes.shape(0)) {
    throw std::invalid_argument("draw_views: images has shape " + shape_text(images) +
                                " and sizes " + shape_text(sizes) + "; expected [B] and [B, 2]");
  }
  const int64_t* image = images.data();
  return fill_table("draw_views", sizes, patches, [&](int64_t p, int64_t b, int64_t h, int64_t w) {
    const ViewKey key{seed, epoch, static_cast<uint64_t>(image[b]), static_cast<uint64_t>(p)};
    return draw_view(specs[p % specs.size()], h, w, key);
  });
}

py::array_t<float> grid_views(const py::object& augment, const Sizes& sizes, int64_t patches) {
  const AugmentSpec spec = parse_augment(augment);
  return fill_table("grid_views", sizes, patches, [&](int64_t p, int64_t, int64_t h, int64_t w) {
    return grid_view(spec, h, w, patches, p);
  });
}

py::array_t<float> center_views(const Sizes& sizes) {
  return fill_table("center_views", sizes, 1,
                    [](int64_t, int64_t, int64_t h, int64_t w) { return center_view(h, w); });
}

ImageView image_view(const py::handle& item) {
  if (!py::isinstance<py::array>(item)) {
    throw std::invalid_argument("patch_views: an image is not a numpy array");
  }
  const auto array = py::reinterpret_borrow<py::array>(item);
  const bool packed = array.ndim() == 3 && array.shape(2) == 3 && array.strides(2) == 1 &&
                      array.strides(1) == 3 && array.strides(0) >= 3 * array.shape(1);
  if (!packed || !py::isinstance<py::array_t<uint8_t>>(array)) {
    throw std::invalid_argument("patch_views: an image is " + std::string(py::str(array.dtype())) +
                                " " + shape_text(array) +
                                "; expected uint8 [H, W, 3] with packed rows (make it contiguous)");
  }
  return {static_cast<const uint8_t*>(array.data()), array.shape(0), array.shape(1),
          array.strides(0)};
}

py::array make_output(py::object out, const ViewOptions& options, int64_t patches, int64_t batch) {
  const char* type = options.dtype == DType::kFloat32   ? "float32"
                     : options.dtype == DType::kFloat16 ? "float16"
                     : options.dtype == DType::kUint8   ? "uint8"
                                                        : "uint16";
  const std::vector<py::ssize_t> shape = {patches, batch, options.out_h, options.out_w, 3};
  if (out.is_none()) return py::array(py::dtype(type), shape);
  const auto array = py::cast<py::array>(out);
  bool fits = array.ndim() == 5 && array.dtype().is(py::dtype(type)) && array.writeable() &&
              (array.flags() & py::array::c_style) != 0;
  for (int i = 0; fits && i < 5; ++i) fits = array.shape(i) == shape[i];
  if (!fits) {
    throw std::invalid_argument("patch_views: out is " + std::string(py::str(array.dtype())) + " " +
                                shape_text(array) + "; expected contiguous, writeable " + type +
                                " " + shape_text(py::array(py::dtype(type), shape)));
  }
  return array;
}

py::array patch_views(const py::sequence& images,
                      const py::array_t<float, py::array::c_style>& params, std::array<int, 2> size,
                      const std::string& interpolation, int blur_kernel, Triple mean, Triple std,
                      const std::string& dtype, const py::object& out, int num_threads) {
  const ViewOptions options = make_options(size, interpolation, blur_kernel, mean, std, dtype);
  const auto batch = static_cast<int64_t>(images.size());
  if (params.ndim() != 3 || params.shape(1) != batch || params.shape(2) != kViewParams) {
    throw std::invalid_argument("patch_views: params has shape " + shape_text(params) + " for " +
                                std::to_string(batch) + " images; expected [P, B, 16]");
  }
  const int64_t patches = params.shape(0);
  std::vector<ImageView> views;
  std::vector<py::object> keep;  // what indexing made lives until the pixels are read
  for (const py::handle item : images) {
    keep.push_back(py::reinterpret_borrow<py::object>(item));
    views.push_back(image_view(item));
  }
  py::array result = make_output(out, options, patches, batch);
  auto* bytes = static_cast<uint8_t*>(result.mutable_data());
  const auto* rows = reinterpret_cast<const ViewParams*>(params.data());
  {
    py::gil_scoped_release release;
    const int64_t patch_bytes =
        int64_t{3} * options.out_h * options.out_w * dtype_size(options.dtype);
    ThreadPool alone(1);  // a plain loop, which waits for nobody else's
    ThreadPool& pool = num_threads == 1 ? alone : shared_pool(num_threads);
    std::vector<Scratch> scratch(static_cast<size_t>(pool.size()));
    pool.parallel_for(batch, [&](int worker, int64_t b) {
      for (int64_t p = 0; p < patches; ++p) {
        const int64_t i = p * batch + b;
        patch_view(views[b], rows[i], options, bytes + i * patch_bytes, scratch[worker]);
      }
    });
  }
  return result;
}

}  // namespace

void register_views(py::module_& m) {
  m.def(
      "check_augment",
      [](const py::object& augment) {
        parse_augment(augment);
        parse_view_options(augment, DType::kFloat32);
      },
      py::arg("augment"), "Raises a ValueError naming the first field that makes no sense.");
  m.def("draw_views", &draw_views, py::arg("augments"), py::arg("sizes"), py::arg("images"),
        py::kw_only(), py::arg("patches"), py::arg("seed"), py::arg("epoch"),
        "Random views: float32 [patches, B, 16]. augments: a sequence of Augment, slot p uses "
        "augments[p % len]; sizes: int64 [B, 2] (height, width); images: int64 [B], the indices in "
        "the data set.");
  m.def("grid_views", &grid_views, py::arg("augment"), py::arg("sizes"), py::kw_only(),
        py::arg("patches"),
        "n * n boxes of the mean scale of an Augment: float32 [patches, B, 16].");
  m.def("center_views", &center_views, py::arg("sizes"),
        "The central square of each image: float32 [1, B, 16].");
  m.def("patch_views", &patch_views, py::arg("images"), py::arg("params"), py::kw_only(),
        py::arg("size"), py::arg("interpolation") = "bilinear", py::arg("blur_kernel") = 0,
        py::arg("mean") = Triple{0, 0, 0}, py::arg("std") = Triple{1, 1, 1},
        py::arg("dtype") = "float32", py::arg("out") = py::none(), py::arg("num_threads") = 1,
        "uint8 images [H, W, 3] and a table [P, B, 16] -> patches [P, B, h, w, 3]; bfloat16 comes "
        "as its bits in uint16. num_threads: 0 for all CPUs.");
  m.def("auto_blur_kernel", &auto_blur_kernel, py::arg("height"), py::arg("width"));
  m.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"));
}

}  // namespace bagssl
