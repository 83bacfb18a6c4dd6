#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <system_error>

#include "simd.h"

namespace bagssl {
void register_blocks(pybind11::module_& m);   // bindings_blocks.cpp
void register_loader(pybind11::module_& m);   // bindings_loader.cpp
void register_ops(pybind11::module_& m);      // bindings_ops.cpp
void register_sources(pybind11::module_& m);  // bindings_sources.cpp
void register_views(pybind11::module_& m);    // bindings_views.cpp
}  // namespace bagssl

namespace {

/// What the operating system refused, a thread for example, as an OSError.
void translate_system_error(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const std::system_error& error) {
    const auto arguments = pybind11::make_tuple(error.code().value(), error.what());
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  pybind11::register_exception_translator(&translate_system_error);
  m.doc() = "The C++ data path of bagssl_fast.";
  m.def("simd_levels", &bagssl::simd_levels,
        "The SIMD levels that this machine can run, lowest first.");
  m.def("simd_level", &bagssl::simd_level_name, "The level in force.");
  m.def("force_simd_level", &bagssl::force_simd_level, pybind11::arg("name"),
        "Puts a level in force for the whole process, for tests; None: what it began with.");
  bagssl::register_blocks(m);
  bagssl::register_sources(m);  // before the loader, whose signature names a source
  bagssl::register_loader(m);
  bagssl::register_ops(m);
  bagssl::register_views(m);
}
