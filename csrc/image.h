#pragma once

#include <cstdint>

#include "patch_views.h"

namespace bagssl {

struct ImageSize {
  int64_t height = 0, width = 0;
};

/// What an image may cost at most; one that exceeds a limit counts as bad.
struct Limits {
  int64_t max_pixels = 178'956'970;        // Pillow's own limit, a quarter of a GiB of RGB
  int64_t max_bytes = int64_t{256} << 20;  // of its file
  int max_scans = 500;                     // of a progressive JPEG: time grows with them, not size
};

/// A rectangle of an image, in pixels.
struct Box {
  int64_t top = 0, left = 0, height = 0, width = 0;
};

/// A part of an image in memory. `top` and `left` say where in the whole image it begins. All are
/// in pixels of the decoded image, which is 1/`denominator` of the file's.
struct Region {
  ImageView view;
  int64_t top = 0, left = 0;
  int denominator = 1;
};

}  // namespace bagssl
