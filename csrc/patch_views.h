#pragma once

#include <cstdint>
#include <memory>

#include "view_params.h"

namespace bagssl {

enum class Interpolation { kBilinear, kBicubic };
enum class DType { kUint8, kFloat32, kBfloat16, kFloat16 };  ///< kUint8: not normalized

/// Bytes of one value.
int64_t dtype_size(DType dtype);

/// A decoded picture: uint8 [height, width, 3] (RGB), rows `row_stride` bytes apart.
struct ImageView {
  const uint8_t* data = nullptr;
  int64_t height = 0, width = 0, row_stride = 0;
};

/// What all patches of a call have in common.
struct ViewOptions {
  int out_h = 0, out_w = 0;
  Interpolation interp = Interpolation::kBilinear;  ///< antialiased either way
  int blur_kernel = 0;                              ///< odd; 0: auto_blur_kernel(out_h, out_w)
  float mean[3] = {0, 0, 0}, std[3] = {1, 1, 1};    ///< of values in 0..1, as torchvision's
  DType dtype = DType::kFloat32;
};

/// The blur kernel for a patch size: a tenth of the shorter side made odd, at least 3 (SimCLR's
/// rule): 3 for 32, 7 for 64, 23 for 224. 1 (no blur) where reflect padding has no room for 3.
int auto_blur_kernel(int out_h, int out_w);

/// Throws std::invalid_argument naming what is wrong with the options.
void check_options(const ViewOptions& options);

/// A thread's buffers and cached resize weights. Use one per thread and keep it: once warm,
/// making a patch allocates nothing.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(Scratch&&) noexcept;
  Scratch& operator=(Scratch&&) noexcept;

  struct Buffers;
  Buffers& buffers() { return *buffers_; }

 private:
  std::unique_ptr<Buffers> buffers_;
};

/// Makes one patch: crop + resize, flip, jitter, grayscale, blur, solarize, normalize.
///
/// The pixels are those of torchvision.transforms.v2.functional on uint8 tensors, stage by stage
/// with uint8 rounding in between: bit for bit up to the blur, whose sums may round the other
/// way in rare ties (1/255). Its PIL path is within 1/255 of that, except for hue, which Pillow
/// knows in 256 steps only: 15/255 at most. Results are bitwise the same on every instruction set.
///
/// `out` receives [out_h, out_w, 3] values of options.dtype. Thread-safe for distinct `out` and
/// `scratch`. Throws std::invalid_argument before anything is written if the parameters do not
/// fit the image or the options.
void patch_view(const ImageView& image, const ViewParams& params, const ViewOptions& options,
                void* out, Scratch& scratch);

}  // namespace bagssl
