// The loader of batches.

#include <memory>
#include <string>
#include <vector>

#include "bindings_parse.h"
#include "loader.h"
#include "source.h"

namespace py = pybind11;

namespace bagssl {
namespace {

/// The loader. Waiting for its threads releases the GIL, which they may need.
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
    constexpr int kTimeout = 100;  // ms between checks for pending signals (Ctrl-C)
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
  throw py::value_error("sampler must be one of random, grid, center, got '" + name + "'");
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
  options.augments = parse_augments(augments);
  for (const py::handle augment : augments) {
    options.views.push_back(parse_view_options(augment, parse_dtype(dtype)));
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

}  // namespace

void register_loader(py::module_& m) {
  m.attr("HELD_BATCHES") = kHeldBatches;
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
