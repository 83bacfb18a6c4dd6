// Sources, decoding and the index of a tar.

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "bindings_parse.h"
#include "file.h"
#include "image_reader.h"
#include "jpeg.h"
#include "source.h"
#include "tar_index.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace bagssl {
namespace {

/// Copies what a Python function returned as an image into `buffer`.
Item store_image(const py::object& image, ByteBuffer& buffer, int64_t max_bytes) {
  Item item;
  uint8_t* bytes;
  if (py::isinstance<py::bytes>(image)) {
    const std::string_view file = py::reinterpret_borrow<py::bytes>(image);
    check_bytes(static_cast<int64_t>(file.size()), max_bytes);
    bytes = buffer.take(file.size());
    std::copy(file.begin(), file.end(), bytes);
    item.size = file.size();
  } else {
    const auto array = py::isinstance<py::array_t<uint8_t>>(image) ? Bytes(image) : Bytes();
    const py::ssize_t channels = array.ndim() == 2 ? 1 : array.ndim() == 3 ? array.shape(2) : 0;
    if (channels != 1 && channels != 3) {
      throw std::runtime_error("read returned " + describe(image) +
                               "; expected bytes (an encoded image file) or a uint8 array "
                               "[H, W, 3], [H, W, 1] or [H, W]");
    }
    bytes = buffer.take(static_cast<size_t>(array.size()));
    std::copy_n(array.data(), array.size(), bytes);
    item.height = array.shape(0);
    item.width = array.shape(1);
    item.channels = channels;
  }
  item.data = bytes;
  return item;
}

/// `read(index) -> bytes or uint8 array` as a source calls it. The GIL is held for that call alone.
FunctionSource::Read python_read(py::object read) {
  std::shared_ptr<py::object> held = shared_object(std::move(read));
  return [held](int64_t index, ByteBuffer& buffer, int64_t max_bytes) {
    py::gil_scoped_acquire gil;
    try {
      return store_image((*held)(index), buffer, max_bytes);
    } catch (py::error_already_set& error) {
      // KeyboardInterrupt and SystemExit are not Exceptions, and not the image's fault.
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
Bytes decode_item(const Item& item, const py::object& decoder, const Limits& limits,
                  const std::optional<std::array<int64_t, 4>>& box, int denominator) {
  if (denominator != 1 && denominator != 2 && denominator != 4 && denominator != 8) {
    throw std::invalid_argument("denominator must be 1, 2, 4 or 8, got " +
                                std::to_string(denominator));
  }
  ImageReader reader(fallback_decoder(decoder), limits);
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
  Limits limits;
  limits.max_pixels = max_pixels;
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
  for (int i = 0; i < pool.size(); ++i) readers.emplace_back(fallback, limits);
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
    const File file(name);
    index =
        index_tar([&](int64_t offset, size_t size, uint8_t* out) { file.read(offset, size, out); },
                  file.size());
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

void bind_sources(py::module_& m) {
  py::class_<Source, std::shared_ptr<Source>>(m, "Source")
      .def("__len__", &Source::size)
      .def(
          "read",
          [](const Source& source, int64_t index, int64_t max_bytes) -> py::object {
            ByteBuffer buffer;
            const Item item = source.read(index, buffer, max_bytes);
            if (!item.is_pixels()) {
              return py::bytes(reinterpret_cast<const char*>(item.data), item.size);
            }
            return Bytes({item.height, item.width, item.channels}, item.data);
          },
          py::arg("index"), py::arg("max_bytes") = Limits().max_bytes,
          "The stored bytes of a file, or the pixels of an array.")
      .def(
          "decode",
          [](const Source& source, int64_t index, const py::object& decoder, int64_t max_pixels) {
            ByteBuffer buffer;
            Limits limits;
            limits.max_pixels = max_pixels;
            const Item item = source.read(index, buffer, limits.max_bytes);
            return decode_item(item, decoder, limits, std::nullopt, 1);
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
             const ArrayShape shape = {images.shape(0), images.shape(1), images.shape(2),
                                       images.shape(3)};
             return std::make_shared<ArraySource>(images.data(), shape, shared_object(images));
           }),
           py::arg("images").noconvert());
  py::class_<ArrayFileSource, Source, std::shared_ptr<ArrayFileSource>>(m, "ArrayFileSource")
      .def(py::init([](const py::bytes& path, int64_t offset, std::array<int64_t, 4> shape) {
             return std::make_shared<ArrayFileSource>(
                 path, offset, ArrayShape{shape[0], shape[1], shape[2], shape[3]});
           }),
           py::arg("path"), py::arg("offset"), py::arg("shape"));
  py::class_<FunctionSource, Source, std::shared_ptr<FunctionSource>>(m, "FunctionSource")
      .def(py::init([](py::object read, int64_t length) {
             return std::make_shared<FunctionSource>(python_read(std::move(read)), length);
           }),
           py::arg("read"), py::arg("length"));
}

}  // namespace

void register_sources(py::module_& m) {
  m.attr("HAS_JPEG") = has_native_jpeg();
  m.attr("MAX_PIXELS") = Limits().max_pixels;
  m.attr("MAX_BYTES") = Limits().max_bytes;
  m.attr("MAX_SCANS") = Limits().max_scans;
  m.def("available_cpus", &available_cpus, "CPUs that this process may use.");
  m.def("quota_cpus", &quota_cpus, py::arg("root"), "The quota of its control group, 0 for none.");
  m.def(
      "count_scans",
      [](const py::bytes& file) {
        const std::string_view bytes = file;
        return count_scans(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
      },
      py::arg("file"), "How many scans a JPEG has.");
  m.def("index_tar", &index_tar_file, py::arg("path"),
        "The regular files of a tar archive: names, name_ends, offsets, sizes, damage.");
  m.def("decode_many", &decode_many, py::arg("files"), py::arg("threads"), py::arg("decoder"),
        py::arg("max_pixels"), "Decodes files, drops the pixels, returns how many there were.");
  m.def(
      "decode",
      [](const py::bytes& file, const py::object& decoder, int64_t max_pixels,
         const std::optional<std::array<int64_t, 4>>& box, int denominator, int max_scans) {
        Item item;
        Limits limits;
        limits.max_pixels = max_pixels;
        limits.max_scans = max_scans;
        const std::string_view bytes = file;
        item.data = reinterpret_cast<const uint8_t*>(bytes.data());
        item.size = bytes.size();
        return decode_item(item, decoder, limits, box, denominator);
      },
      py::arg("file"), py::arg("decoder"), py::arg("max_pixels"), py::arg("box") = py::none(),
      py::arg("denominator") = 1, py::arg("max_scans") = Limits().max_scans,
      "A file's upright RGB image, or its part in box = (top, left, height, width).");
  bind_sources(m);
}

}  // namespace bagssl
