// The loader of batches.

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "bindings_parse.h"
#include "loader.h"
#include "source.h"

namespace py = pybind11;

namespace bagssl {
namespace {

constexpr int kTimeout = 100;  // ms between checks for pending signals (Ctrl-C)

Memory memory_of(Bytes& array) {
  if (array.ndim() != 1) {
    throw std::invalid_argument("memory has shape " + shape_text(array) + "; expected uint8 [N]");
  }
  Memory memory;
  memory.data = array.mutable_data();
  memory.capacity = array.size();
  memory.owner = shared_object(array);
  return memory;
}

[[noreturn]] void refuse_ended() {
  throw std::runtime_error(
      "this iteration ended: its loader was iterated again, moved by seek, or closed");
}

/// Raises what a signal's handler raised.
void run_signal_handlers() {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

/// The loader. Waiting for its threads releases the GIL, which they may need, and lets Python's
/// signal handlers run.
class PyLoader {
 public:
  PyLoader(std::shared_ptr<Source> source, LoaderOptions options, std::vector<Bytes> slots,
           const Column<int64_t>& subset, py::object decoder) {
    std::vector<Memory> memory;
    for (Bytes& slot : slots) memory.push_back(memory_of(slot));
    loader_ = std::make_shared<Loader>(std::move(source), std::move(options), std::move(memory),
                                       to_vector(subset), fallback_decoder(std::move(decoder)));
  }
  ~PyLoader() {
    py::gil_scoped_release release;
    if (!is_stalled_ && !loader_->stop(-1, kDyingPatience)) loader_->leave_behind();
    loader_.reset();
  }

  int64_t start(uint64_t epoch, const Column<int64_t>& rows, const Column<int64_t>& batch_ends,
                int64_t first_batch) {
    const EpochPlan plan = {epoch, to_vector(rows), to_vector(batch_ends)};
    while (true) {
      int64_t run;
      {
        py::gil_scoped_release release;
        run = loader_->start(plan, first_batch, kTimeout);
      }
      if (run >= 0) {
        is_stalled_ = false;
        return run;
      }
      run_signal_handlers();
    }
  }

  /// None at the end, else (slot, indices, bytes of pixels, error index or -1, reason).
  py::object next(int64_t run) {
    Batch batch;
    while (true) {
      Loader::Status status;
      {
        py::gil_scoped_release release;
        status = loader_->next(run, kTimeout, &batch);
      }
      if (status == Loader::Status::kStopped) refuse_ended();
      if (status == Loader::Status::kEnd) return py::none();
      if (status == Loader::Status::kReady) break;
      run_signal_handlers();
    }
    return py::make_tuple(batch.slot, to_column(batch.indices), batch.pixel_bytes,
                          batch.error.index, batch.error.reason);
  }

  void move_pixels(int64_t run, int slot, Bytes array) {
    Memory memory = memory_of(array);
    py::gil_scoped_release release;
    if (!loader_->move_pixels(run, slot, std::move(memory))) refuse_ended();
  }

  void set_slot(int slot, Bytes array) { loader_->set_slot(slot, memory_of(array)); }
  void set_pixels(int slot, Bytes array) { loader_->set_pixels(slot, memory_of(array)); }

  /// The images whose reads have not returned within `patience` seconds: their threads are left
  /// behind, and not waited for again.
  std::vector<int64_t> stop(int64_t run, double patience) {
    if (is_stalled_) return {};
    for (int waited = 0;; waited += kTimeout) {
      {
        py::gil_scoped_release release;
        if (loader_->stop(run, kTimeout)) return {};
      }
      run_signal_handlers();
      if (waited >= 1000 * patience) break;
    }
    std::vector<int64_t> images = loader_->unfinished();
    loader_->leave_behind();
    is_stalled_ = true;
    return images;
  }

  void after_fork() { loader_->after_fork(); }

  std::vector<std::pair<int64_t, std::string>> skipped() const {
    std::vector<std::pair<int64_t, std::string>> result;
    for (const BadImage& bad : loader_->skipped()) result.emplace_back(bad.index, bad.reason);
    return result;
  }

 private:
  static constexpr int kDyingPatience = 1000;  // ms

  std::shared_ptr<Loader> loader_;
  bool is_stalled_ = false;  // threads of the latest run were left behind
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
                                      int64_t max_pixels, int64_t max_bytes, int max_scans,
                                      bool cut, std::vector<Bytes> slots,
                                      const Column<int64_t>& subset, py::object decoder) {
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
  options.limits = {max_pixels, max_bytes, max_scans};
  options.cut = cut;
  return std::make_unique<PyLoader>(std::move(source), std::move(options), std::move(slots), subset,
                                    std::move(decoder));
}

}  // namespace

void register_loader(py::module_& m) {
  m.attr("HELD_BATCHES") = kHeldBatches;
  py::class_<PyLoader>(m, "Loader")
      .def(py::init(&make_loader), py::kw_only(), py::arg("source"), py::arg("augments"),
           py::arg("patches"), py::arg("sampler"), py::arg("dtype"), py::arg("seed"),
           py::arg("threads"), py::arg("batches_ahead"), py::arg("skip_bad"),
           py::arg("dct_scaling"), py::arg("max_pixels"), py::arg("max_bytes"),
           py::arg("max_scans"), py::arg("cut"), py::arg("slots").noconvert(), py::arg("subset"),
           py::arg("decoder"))
      .def("start", &PyLoader::start, py::arg("epoch"), py::arg("rows"), py::arg("batch_ends"),
           py::arg("first_batch"))
      .def("next", &PyLoader::next, py::arg("run"))
      .def("move_pixels", &PyLoader::move_pixels, py::arg("run"), py::arg("slot"),
           py::arg("memory").noconvert())
      .def("set_slot", &PyLoader::set_slot, py::arg("slot"), py::arg("memory").noconvert())
      .def("set_pixels", &PyLoader::set_pixels, py::arg("slot"), py::arg("memory").noconvert())
      .def("stop", &PyLoader::stop, py::arg("run") = -1, py::arg("patience") = 5.0)
      .def("after_fork", &PyLoader::after_fork)
      .def_property_readonly("skipped", &PyLoader::skipped);
}

}  // namespace bagssl
