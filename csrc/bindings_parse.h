#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "image_reader.h"
#include "patch_views.h"
#include "view_params.h"

namespace bagssl {

// Python's objects as the core's types, in one place for all bindings.

using Bytes = pybind11::array_t<uint8_t, pybind11::array::c_style>;
template <typename T>
using Column = pybind11::array_t<T, pybind11::array::c_style | pybind11::array::forcecast>;

template <typename T>
std::vector<T> to_vector(const Column<T>& column) {
  return std::vector<T>(column.data(), column.data() + column.size());
}

template <typename T>
Column<T> to_column(const std::vector<T>& values) {
  return Column<T>(static_cast<pybind11::ssize_t>(values.size()), values.data());
}

/// "[2, 3]"
std::string shape_text(const pybind11::array& array);

/// "an array of type uint8 and shape [2, 3]", or the type of anything else.
std::string describe(const pybind11::object& object);

/// "ValueError: the message" of a Python exception, whose own `__str__` may fail.
std::string exception_text(const pybind11::error_already_set& error);

DType parse_dtype(const std::string& name);
Interpolation parse_interpolation(const std::string& name);

/// What an `Augment` (bagssl_fast/augment.py) says about the draws of views, checked.
AugmentSpec parse_augment(const pybind11::handle& augment);

/// One or more of them.
std::vector<AugmentSpec> parse_augments(const pybind11::sequence& augments);

/// What an `Augment` says about the patches of its views, checked.
ViewOptions parse_view_options(const pybind11::handle& augment, DType dtype);

/// A Python object that a thread may release without holding the GIL.
std::shared_ptr<pybind11::object> shared_object(pybind11::object object);

/// `decoder(memoryview, max_pixels) -> uint8 [H, W, 3]`, or None, as the core calls it. The GIL is
/// held for that call alone.
FallbackDecoder fallback_decoder(pybind11::object decoder);

}  // namespace bagssl
