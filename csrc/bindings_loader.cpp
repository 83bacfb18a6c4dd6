#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "image_reader.h"
#include "jpeg.h"
#include "loader.h"
#include "source.h"
#include "tar_index.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace bagssl {
namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;
template <typename T>
using Column = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <typename T>
std::vector<T> to_vector(const Column<T>& column) {
  return std::vector<T>(column.data(), column.data() + column.size());
}

template <typename T>
Column<T> to_column(const std::vector<T>& values) {
  return Column<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBfloat16;
  if (name == "float16") return DType::kFloat16;
  if (name == "uint8") return DType::kUint8;
  throw py::value_error("dtype '" + name + "' is unknown: float32, bfloat16, float16 or uint8");
}

Interpolation parse_interpolation(const std::string& name) {
  if (name == "bilinear") return Interpolation::kBilinear;
  if (name == "bicubic") return Interpolation::kBicubic;
  throw py::value_error("interpolation '" + name + "' is unknown: bilinear or bicubic");
}

/// The fields of a Python `Augment` (bagssl_fast/augment.py), checked.
AugmentSpec augment_spec(const py::handle& augment) {
  const auto number = [&](const char* name) { return augment.attr(name).cast<double>(); };
  const auto pair = [&](const char* name, double* out) {
    const auto ends = augment.attr(name).cast<std::array<double, 2>>();
    out[0] = ends[0];
    out[1] = ends[1];
  };
  AugmentSpec spec;
  pair("scale", spec.scale);
  pair("ratio", spec.ratio);
  spec.hflip = number("hflip");
  spec.brightness = number("brightness");
  spec.contrast = number("contrast");
  spec.saturation = number("saturation");
  spec.hue = number("hue");
  spec.jitter_prob = number("jitter_prob");
  spec.grayscale_prob = number("grayscale_prob");
  spec.blur_prob = number("blur_prob");
  pair("blur_sigma", spec.blur_sigma);
  spec.solarize_prob = number("solarize_prob");
  spec.solarize_threshold = number("solarize_threshold");
  check_spec(spec);
  return spec;
}

ViewOptions view_options(const py::handle& augment, DType dtype) {
  ViewOptions options;
  options.out_h = options.out_w = augment.attr("size").cast<int>();
  options.interp = parse_interpolation(augment.attr("interpolation").cast<std::string>());
  options.blur_kernel = augment.attr("blur_kernel").cast<int>();
  const auto mean = augment.attr("mean").cast<std::array<float, 3>>();
  const auto std = augment.attr("std").cast<std::array<float, 3>>();
  for (int c = 0; c < 3; ++c) {
    options.mean[c] = mean[c];
    options.std[c] = std[c];
  }
  options.dtype = dtype;
  check_options(options);
  return options;
}

/// A Python object that may be let go of by a thread without the GIL.
std::shared_ptr<py::object> shared_object(py::object object) {
  return {new py::object(std::move(object)), [](py::object* held) {
            py::gil_scoped_acquire gil;
            delete held;
          }};
}

/// "ValueError: the message" of a Python exception, whose own `__str__` may fail.
std::string exception_text(const py::error_already_set& error) {
  const auto name = error.type().attr("__name__").cast<std::string>();
  const auto text = py::reinterpret_steal<py::object>(PyObject_Str(error.value().ptr()));
  // Names of files may be in any encoding.
  const auto encoded = py::reinterpret_steal<py::object>(
      text ? PyUnicode_AsEncodedString(text.ptr(), "utf-8", "backslashreplace") : nullptr);
  PyErr_Clear();
  return encoded && py::len(encoded) > 0 ? name + ": " + std::string(py::bytes(encoded)) : name;
}

/// `decoder(memoryview, max_pixels) -> uint8 [H, W, 3]` as the core wants it. The GIL is held for
/// that call alone.
FallbackDecoder fallback_decoder(py::object decoder) {
  if (decoder.is_none()) return {};
  std::shared_ptr<py::object> held = shared_object(std::move(decoder));
  return [held](const uint8_t* data, size_t size, int64_t max_pixels) {
    py::gil_scoped_acquire gil;
    try {
      const auto file = py::memoryview::from_memory(data, static_cast<py::ssize_t>(size));
      const Bytes image((*held)(file, max_pixels));
      if (image.ndim() != 3 || image.shape(2) != 3) {
        throw std::runtime_error("the decoder did not return uint8 [H, W, 3]");
      }
      DecodedImage decoded;
      decoded.height = image.shape(0);
      decoded.width = image.shape(1);
      decoded.pixels.assign(image.data(), image.data() + image.size());
      return decoded;
    } catch (py::error_already_set& error) {
      throw std::runtime_error(py::str(error.value()).cast<std::string>());
    }
  };
}

/// What a Python object is, for errors: its type, and the shape of an array.
std::string describe(const py::object& object) {
  if (!py::isinstance<py::array>(object)) {
    return "an object of type " +
           py::str(py::type::of(object).attr("__name__")).cast<std::string>();
  }
  return "an array of type " + py::str(object.attr("dtype")).cast<std::string>() + " and shape " +
         py::str(py::list(object.attr("shape"))).cast<std::string>();
}

/// Copies what a Python function returned as an image into `buffer`.
Item store_image(const py::object& image, std::vector<uint8_t>& buffer) {
  Item item;
  if (py::isinstance<py::bytes>(image)) {
    const std::string_view file = py::reinterpret_borrow<py::bytes>(image);
    buffer.assign(file.begin(), file.end());
    item.size = file.size();
  } else {
    const auto array = py::isinstance<py::array_t<uint8_t>>(image) ? Bytes(image) : Bytes();
    const py::ssize_t channels = array.ndim() == 2 ? 1 : array.ndim() == 3 ? array.shape(2) : 0;
    if (channels != 1 && channels != 3) {
      throw std::runtime_error("read returned " + describe(image) +
                               "; expected bytes (an encoded image file) or a uint8 array "
                               "[H, W, 3], [H, W, 1] or [H, W]");
    }
    buffer.assign(array.data(), array.data() + array.size());
    item.height = array.shape(0);
    item.width = array.shape(1);
    item.channels = channels;
  }
  item.data = buffer.data();
  return item;
}

/// `read(index) -> bytes or uint8 array` as a source wants it. The GIL is held for that call alone.
FunctionSource::Read python_read(py::object read) {
  std::shared_ptr<py::object> held = shared_object(std::move(read));
  return [held](int64_t index, std::vector<uint8_t>& buffer) {
    py::gil_scoped_acquire gil;
    try {
      return store_image((*held)(index), buffer);
    } catch (py::error_already_set& error) {
      // What is no Exception (KeyboardInterrupt, SystemExit) says nothing about the image.
      if (!error.matches(PyExc_Exception)) throw;
      throw std::runtime_error("read raised " + exception_text(error));
    }
  };
}

Bytes to_array(const ImageView& view) {
  Bytes array({view.height, view.width, int64_t{3}});
  for (int64_t y = 0; y < view.height; ++y) {
    std::memcpy(array.mutable_data(y), view.data + y * view.row_stride,
                static_cast<size_t>(view.width * 3));
  }
  return array;
}

/// The decoded image or the part of it in `box` (top, left, height, width), exactly.
Bytes decode_item(const Item& item, const py::object& decoder, int64_t max_pixels,
                  const std::optional<std::array<int64_t, 4>>& box, int denominator) {
  ImageReader reader(fallback_decoder(decoder), max_pixels);
  ImageView view;
  {
    py::gil_scoped_release release;
    const ImageSize size = reader.open(item);
    Box needed = {0, 0, size.height, size.width};
    if (box) needed = {(*box)[0], (*box)[1], (*box)[2], (*box)[3]};
    const Region region = reader.decode(needed, denominator);
    view = region.view;
    if (box && region.denominator == 1) {
      view.data += (needed.top - region.top) * view.row_stride + (needed.left - region.left) * 3;
      view.height = needed.height;
      view.width = needed.width;
    }
  }
  return to_array(view);
}

int64_t decode_many(const std::vector<py::bytes>& files, int threads, const py::object& decoder,
                    int64_t max_pixels) {
  std::vector<Item> items(files.size());
  for (size_t i = 0; i < files.size(); ++i) {
    char* data;
    py::ssize_t size;
    if (PyBytes_AsStringAndSize(files[i].ptr(), &data, &size) != 0) throw py::error_already_set();
    items[i].data = reinterpret_cast<const uint8_t*>(data);
    items[i].size = static_cast<size_t>(size);
  }
  const FallbackDecoder fallback = fallback_decoder(decoder);
  py::gil_scoped_release release;
  ThreadPool& pool = shared_pool(threads);
  std::vector<ImageReader> readers;
  for (int i = 0; i < pool.size(); ++i) readers.emplace_back(fallback, max_pixels);
  std::vector<int64_t> pixels(readers.size(), 0);
  pool.parallel_for(static_cast<int64_t>(items.size()), [&](int worker, int64_t i) {
    const ImageSize size = readers[worker].open(items[i]);
    readers[worker].decode();
    pixels[worker] += size.height * size.width;
  });
  int64_t total = 0;
  for (int64_t count : pixels) total += count;
  return total;
}

py::dict index_tar_file(const py::bytes& path) {
  TarIndex index;
  {
    const std::string name = path;
    py::gil_scoped_release release;
    const MappedFile file(name);
    index = index_tar(file.data(), file.size());
  }
  py::dict result;
  result["names"] = py::bytes(index.names);
  result["name_ends"] = to_column(index.name_ends);
  result["offsets"] = to_column(index.offsets);
  result["sizes"] = to_column(index.sizes);
  // Names in the text may be in any encoding.
  result["damage"] = py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(
      index.damage.data(), static_cast<py::ssize_t>(index.damage.size()), "backslashreplace"));
  return result;
}

std::vector<std::string> to_strings(const std::vector<py::bytes>& texts) {
  return std::vector<std::string>(texts.begin(), texts.end());
}

/// The loader, with the GIL released wherever its threads are waited for: they may need it.
class PyLoader {
 public:
  PyLoader(std::shared_ptr<Source> source, LoaderOptions options,
           const std::vector<uintptr_t>& slots, const Column<int64_t>& subset, py::object decoder,
           py::object owner)
      : owner_(std::move(owner)) {
    std::vector<void*> pointers;
    for (uintptr_t slot : slots) pointers.push_back(reinterpret_cast<void*>(slot));
    loader_ = std::make_unique<Loader>(std::move(source), std::move(options), std::move(pointers),
                                       to_vector(subset), fallback_decoder(std::move(decoder)));
  }
  ~PyLoader() {
    py::gil_scoped_release release;
    loader_.reset();
  }

  void start(uint64_t epoch, const Column<int64_t>& rows, const Column<int64_t>& batch_ends,
             int64_t first_batch) {
    EpochPlan plan = {epoch, to_vector(rows), to_vector(batch_ends)};
    py::gil_scoped_release release;
    loader_->start(std::move(plan), first_batch);
  }

  /// None at the end, else (slot, indices, bytes of pixels, error index or -1, reason).
  py::object next() {
    constexpr int kTimeout = 100;  // ms between looks at pending signals (Ctrl-C)
    Batch batch;
    while (true) {
      Loader::Status status;
      {
        py::gil_scoped_release release;
        status = loader_->next(kTimeout, &batch);
      }
      if (status == Loader::Status::kEnd) return py::none();
      if (status == Loader::Status::kReady) break;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    return py::make_tuple(batch.slot, to_column(batch.indices), batch.pixel_bytes,
                          batch.error.index, batch.error.reason);
  }

  void move_pixels(int slot, uintptr_t data, int64_t capacity) {
    py::gil_scoped_release release;
    loader_->move_pixels(slot, {reinterpret_cast<uint8_t*>(data), capacity});
  }

  void stop() {
    py::gil_scoped_release release;
    loader_->stop();
  }

  std::vector<std::pair<int64_t, std::string>> skipped() const {
    std::vector<std::pair<int64_t, std::string>> result;
    for (const BadImage& bad : loader_->skipped()) result.emplace_back(bad.index, bad.reason);
    return result;
  }

 private:
  py::object owner_;  // of the slots' memory
  std::unique_ptr<Loader> loader_;
};

Sampler parse_sampler(const std::string& name) {
  if (name == "random") return Sampler::kRandom;
  if (name == "grid") return Sampler::kGrid;
  if (name == "center") return Sampler::kCenter;
  throw py::value_error("sampler '" + name + "' is unknown: random, grid or center");
}

std::unique_ptr<PyLoader> make_loader(std::shared_ptr<Source> source, const py::sequence& augments,
                                      int64_t patches, const std::string& sampler,
                                      const std::string& dtype, uint64_t seed, int threads,
                                      int batches_ahead, bool skip_bad, bool dct_scaling,
                                      int64_t max_pixels, bool cut,
                                      const std::vector<uintptr_t>& slots,
                                      const Column<int64_t>& subset, py::object decoder,
                                      py::object owner) {
  LoaderOptions options;
  options.patches = patches;
  options.sampler = parse_sampler(sampler);
  for (const py::handle augment : augments) {
    options.augments.push_back(augment_spec(augment));
    options.views.push_back(view_options(augment, parse_dtype(dtype)));
  }
  options.seed = seed;
  options.threads = threads;
  options.batches_ahead = batches_ahead;
  options.skip_bad = skip_bad;
  options.dct_scaling = dct_scaling;
  options.max_pixels = max_pixels;
  options.cut = cut;
  return std::make_unique<PyLoader>(std::move(source), std::move(options), slots, subset,
                                    std::move(decoder), std::move(owner));
}

void bind_sources(py::module_& m) {
  py::class_<Source, std::shared_ptr<Source>>(m, "Source")
      .def("__len__", &Source::size)
      .def(
          "read",
          [](const Source& source, int64_t index) -> py::object {
            std::vector<uint8_t> buffer;
            const Item item = source.read(index, buffer);
            if (!item.is_pixels()) {
              return py::bytes(reinterpret_cast<const char*>(item.data), item.size);
            }
            return Bytes({item.height, item.width, item.channels}, item.data);
          },
          py::arg("index"), "The stored bytes of a file, or the pixels of an array.")
      .def(
          "decode",
          [](const Source& source, int64_t index, const py::object& decoder, int64_t max_pixels) {
            std::vector<uint8_t> buffer;
            return decode_item(source.read(index, buffer), decoder, max_pixels, std::nullopt, 1);
          },
          py::arg("index"), py::arg("decoder"), py::arg("max_pixels"),
          "The upright RGB image, uint8 [H, W, 3].");
  py::class_<ShardSource, Source, std::shared_ptr<ShardSource>>(m, "ShardSource")
      .def(py::init([](const std::vector<py::bytes>& paths, const Column<int32_t>& shard,
                       const Column<int64_t>& offsets, const Column<int64_t>& sizes) {
             return std::make_shared<ShardSource>(to_strings(paths), to_vector(shard),
                                                  to_vector(offsets), to_vector(sizes));
           }),
           py::arg("paths"), py::arg("shard"), py::arg("offsets"), py::arg("sizes"));
  py::class_<FileSource, Source, std::shared_ptr<FileSource>>(m, "FileSource")
      .def(py::init([](const std::vector<py::bytes>& paths) {
             return std::make_shared<FileSource>(to_strings(paths));
           }),
           py::arg("paths"));
  py::class_<ArraySource, Source, std::shared_ptr<ArraySource>>(m, "ArraySource")
      .def(py::init([](const Bytes& images) {
             if (images.ndim() != 4) throw py::value_error("images must be uint8 [N, H, W, C]");
             return std::make_shared<ArraySource>(images.data(), images.shape(0), images.shape(1),
                                                  images.shape(2), images.shape(3),
                                                  shared_object(images));
           }),
           py::arg("images").noconvert());
  py::class_<FunctionSource, Source, std::shared_ptr<FunctionSource>>(m, "FunctionSource")
      .def(py::init([](py::object read, int64_t length) {
             return std::make_shared<FunctionSource>(python_read(std::move(read)), length);
           }),
           py::arg("read"), py::arg("length"));
}

}  // namespace

void register_loader(py::module_& m) {
  m.attr("HAS_JPEG") = has_native_jpeg();
  m.attr("HELD_BATCHES") = kHeldBatches;
  m.def("available_cpus", &available_cpus, "CPUs that this process may run on.");
  m.def("index_tar", &index_tar_file, py::arg("path"),
        "The regular files of a tar archive: names, name_ends, offsets, sizes, damage.");
  m.def("decode_many", &decode_many, py::arg("files"), py::arg("threads"), py::arg("decoder"),
        py::arg("max_pixels"), "Decodes files, drops the pixels, returns how many there were.");
  m.def(
      "decode",
      [](const py::bytes& file, const py::object& decoder, int64_t max_pixels,
         const std::optional<std::array<int64_t, 4>>& box, int denominator) {
        Item item;
        const std::string_view bytes = file;
        item.data = reinterpret_cast<const uint8_t*>(bytes.data());
        item.size = bytes.size();
        return decode_item(item, decoder, max_pixels, box, denominator);
      },
      py::arg("file"), py::arg("decoder"), py::arg("max_pixels"), py::arg("box") = py::none(),
      py::arg("denominator") = 1,
      "A file's upright RGB image, or its part in box = (top, left, height, width).");
  bind_sources(m);
  py::class_<PyLoader>(m, "Loader")
      .def(py::init(&make_loader), py::kw_only(), py::arg("source"), py::arg("augments"),
           py::arg("patches"), py::arg("sampler"), py::arg("dtype"), py::arg("seed"),
           py::arg("threads"), py::arg("batches_ahead"), py::arg("skip_bad"),
           py::arg("dct_scaling"), py::arg("max_pixels"), py::arg("cut"), py::arg("slots"),
           py::arg("subset"), py::arg("decoder"), py::arg("owner"))
      .def("start", &PyLoader::start, py::arg("epoch"), py::arg("rows"), py::arg("batch_ends"),
           py::arg("first_batch"))
      .def("next", &PyLoader::next)
      .def("move_pixels", &PyLoader::move_pixels, py::arg("slot"), py::arg("data"),
           py::arg("capacity"))
      .def("stop", &PyLoader::stop)
      .def_property_readonly("skipped", &PyLoader::skipped);
}

}  // namespace bagssl
