#include "patch_views.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "pixel_ops.h"
#include "resize_weights.h"

namespace bagssl {
namespace {

constexpr int kLargestPatch = 1 << 12;  // so that sums over its pixels fit an int
constexpr int kOrders = 24;

[[noreturn]] void reject(const std::string& text) {
  throw std::invalid_argument("patch_view: " + text);
}

bool is_flag(float x) { return x == 0.0f || x == 1.0f; }

bool is_integer_in(double x, double low, double high) {
  return x >= low && x <= high && x == std::floor(x);
}

bool is_factor(float x) { return x >= 0.0f && std::isfinite(x); }

int resolved_blur_kernel(const ViewOptions& options) {
  return options.blur_kernel != 0 ? options.blur_kernel
                                  : auto_blur_kernel(options.out_h, options.out_w);
}

void check_box(const ImageView& image, const ViewParams& view) {
  if (image.data == nullptr || image.height <= 0 || image.width <= 0 ||
      image.row_stride < 3 * image.width) {
    reject(
        "the image is " + std::to_string(image.height) + " x " + std::to_string(image.width) +
        " with rows " + std::to_string(image.row_stride) +
        " bytes apart; expected RGB data of positive size with rows of at least 3 * width bytes");
  }
  // Beyond 2^24 a float's sums and an integer as a float are rounded: past the edge.
  const auto height = static_cast<double>(image.height), width = static_cast<double>(image.width);
  const bool integers = is_integer_in(view.top, 0, height) && is_integer_in(view.left, 0, width) &&
                        is_integer_in(view.height, 1, height) &&
                        is_integer_in(view.width, 1, width);
  if (!integers || double{view.top} + double{view.height} > height ||
      double{view.left} + double{view.width} > width) {
    reject("the crop (top " + std::to_string(view.top) + ", left " + std::to_string(view.left) +
           ", height " + std::to_string(view.height) + ", width " + std::to_string(view.width) +
           ") is no box of whole pixels inside the image of " + std::to_string(image.height) +
           " x " + std::to_string(image.width));
  }
}

void check_view(const ViewParams& view, const ViewOptions& options) {
  if (!is_flag(view.flip) || !is_flag(view.grayscale)) {
    reject("flip is " + std::to_string(view.flip) + " and grayscale " +
           std::to_string(view.grayscale) + "; expected 0 or 1");
  }
  if (!is_integer_in(view.order, -1, kOrders - 1)) {
    reject("order is " + std::to_string(view.order) + "; expected -1 (no jitter) or 0..23");
  }
  if (view.order >= 0 && !(is_factor(view.brightness) && is_factor(view.contrast) &&
                           is_factor(view.saturation) && std::fabs(view.hue) <= 0.5f)) {
    reject("the jitter is brightness " + std::to_string(view.brightness) + ", contrast " +
           std::to_string(view.contrast) + ", saturation " + std::to_string(view.saturation) +
           ", hue " + std::to_string(view.hue) +
           "; expected finite factors >= 0 and a hue shift in [-0.5, 0.5]");
  }
  if (!is_factor(view.blur_sigma)) {
    reject("blur_sigma is " + std::to_string(view.blur_sigma) + "; expected 0 (none) or more");
  }
  const int pad = resolved_blur_kernel(options) / 2;
  if (view.blur_sigma > 0 && pad >= std::min(options.out_h, options.out_w)) {
    reject("a blur kernel of " + std::to_string(2 * pad + 1) + " reflects " + std::to_string(pad) +
           " pixels, more than a patch of " + std::to_string(options.out_h) + " x " +
           std::to_string(options.out_w) + " has; choose a smaller blur_kernel");
  }
  if (!(view.solarize >= 0.0f)) {
    reject("solarize is " + std::to_string(view.solarize) +
           "; expected a threshold in 0..255, or 256 for none");
  }
}

float half_to_float_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

/// Round to nearest, halves to even; x is finite.
uint16_t to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/// Round to nearest, halves to even, subnormals kept, too large becomes infinite.
uint16_t to_float16(float x) {
  const uint32_t sign = float_bits(x) >> 16 & 0x8000;
  const uint32_t bits = float_bits(x) & 0x7FFFFFFF;
  if (bits >= 0x47800000)
    return static_cast<uint16_t>(sign | (bits > 0x7F800000 ? 0x7E00 : 0x7C00));
  if (bits < 0x38800000) {
    // Adding 0.5 lines the float's last bit up with the subnormals' spacing of 2^-24.
    const uint32_t shifted = float_bits(half_to_float_bits(bits) + 0.5f);
    return static_cast<uint16_t>(sign | (shifted - 0x3F000000));
  }
  const uint32_t rounded = bits + 0xFFF + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

}  // namespace

/// A thread's working memory.
struct Scratch::Buffers {
  WeightCache weights;
  std::vector<uint8_t> row;        // two rows of the crop, padded for reads past their end
  std::vector<uint8_t> narrowed;   // RGBX [crop height, out width]
  std::vector<uint8_t> resized;    // RGBX [out height, out width]
  std::vector<float> planes;       // 3 x Planes::size
  std::vector<float> blurred;      // one row, padded on both sides
  std::vector<const float*> rows;  // of a blur's window
  std::vector<float> kernel;

  // value * scale[c] + offset[c] and its table in 16 bits, of the options they were made for.
  float mean[3] = {0, 0, 0}, std[3] = {0, 0, 0};
  DType table_dtype = DType::kUint8;
  float scale[3], offset[3];
  uint16_t table[3][256];
};

namespace {

using Buffers = Scratch::Buffers;

template <typename T>
T* at_least(std::vector<T>& buffer, size_t size) {
  if (buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

/// Crop, resize and flip into planes, rounded to uint8 after each of the two passes.
void resize(const ImageView& image, const ViewParams& view, const ViewOptions& options,
            const PixelOps& ops, Buffers& buffers, Planes planes) {
  const int height = static_cast<int>(view.height), width = static_cast<int>(view.width);
  const bool flip = view.flip != 0.0f;
  const int stride = 4 * (options.out_w + kWidthPadding);
  const size_t row_bytes = 3 * static_cast<size_t>(width);
  uint8_t* padded = at_least(buffers.row, 2 * (row_bytes + kRowPadding));
  uint8_t* narrowed = at_least(buffers.narrowed, (height + size_t{1}) * stride);
  const uint8_t* first = image.data + static_cast<int64_t>(view.top) * image.row_stride +
                         3 * static_cast<int64_t>(view.left);
  const uint8_t* image_end = image.data + (image.height - 1) * image.row_stride + 3 * image.width;
  // A row whose padding would leave the image is copied.
  const auto source = [&](int y) {
    const uint8_t* row = first + y * image.row_stride;
    if (static_cast<size_t>(image_end - row) >= row_bytes + kRowPadding) return row;
    uint8_t* copy = padded + (y % 2) * (row_bytes + kRowPadding);
    std::memcpy(copy, row, row_bytes);
    return static_cast<const uint8_t*>(copy);
  };
  const auto target = [&](int y) { return narrowed + static_cast<int64_t>(y) * stride; };

  if (width == options.out_w) {
    for (int y = 0; y < height; ++y) {
      ops.copy_row(first + y * image.row_stride, width, flip, target(y));
    }
  } else {
    const AxisWeights& across = buffers.weights.get(width, options.out_w, options.interp);
    for (int y = 0; y < height; y += 2) {
      const int next = std::min(y + 1, height - 1);
      ops.resize_rows(source(y), source(next), across, flip, target(y), target(next));
    }
  }

  const AxisWeights* down = height == options.out_h
                                ? nullptr
                                : &buffers.weights.get(height, options.out_h, options.interp);
  for (int y = 0; y < options.out_h; ++y) {
    const int64_t at = static_cast<int64_t>(y) * options.out_w;
    float *r = planes.channel[0] + at, *g = planes.channel[1] + at, *b = planes.channel[2] + at;
    if (down == nullptr) {
      ops.unpack_row(target(y), options.out_w, r, g, b);
    } else {
      ops.resize_column(narrowed, stride, *down, y, options.out_w, r, g, b);
    }
  }
  const int pixels = options.out_h * options.out_w;
  for (float* plane : planes.channel) std::fill(plane + pixels, plane + planes.size, 0.0f);
}

/// The `index`-th permutation of four stages in lexicographic order, applied from left to right.
void jitter(const ViewParams& view, int pixels, const PixelOps& ops, Planes planes) {
  int stages[4] = {0, 1, 2, 3};
  int index = static_cast<int>(view.order);
  for (int i = 0, count = 6; i < 3; ++i) {
    std::rotate(stages + i, stages + i + index / count, stages + i + index / count + 1);
    index %= count;
    count /= 3 - i;
  }
  // A factor of 1 and a shift of 0 give the same pixels back.
  for (const int stage : stages) {
    if (stage == 0 && view.brightness != 1.0f) ops.brightness(planes, view.brightness);
    if (stage == 1 && view.contrast != 1.0f) ops.contrast(planes, view.contrast, pixels);
    if (stage == 2 && view.saturation != 1.0f) ops.saturation(planes, view.saturation);
    if (stage == 3 && view.hue != 0.0f) ops.hue(planes, view.hue);
  }
}

/// torchvision's kernel: exp(-x^2 / (2 sigma^2)) at whole pixels, summing to one.
void gaussian(float sigma, int size, float* kernel) {
  double total = 0.0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int k = 0; k < size; ++k) {
      const double x = (k - size / 2) / static_cast<double>(sigma);
      const double value = std::exp(-0.5 * x * x);
      if (pass == 0) total += value;
      if (pass == 1) kernel[k] = static_cast<float>(value / total);
    }
  }
}

int reflect(int i, int size) { return i < 0 ? -i : i >= size ? 2 * (size - 1) - i : i; }

void blur(float sigma, const ViewOptions& options, const PixelOps& ops, Buffers& buffers,
          Planes planes) {
  const int size = resolved_blur_kernel(options), pad = size / 2;
  const int height = options.out_h, width = options.out_w;
  if (size == 1) return;
  float* kernel = at_least(buffers.kernel, size);
  gaussian(sigma, size, kernel);
  const int stride = width + 2 * pad + kWidthPadding;
  float* padded = at_least(buffers.blurred, static_cast<size_t>(height) * stride);
  const float** rows = at_least(buffers.rows, size);
  for (float* plane : planes.channel) {
    for (int y = 0; y < height; ++y) {
      for (int k = 0; k < size; ++k) {
        rows[k] = plane + static_cast<int64_t>(reflect(y + k - pad, height)) * width;
      }
      float* row = padded + static_cast<int64_t>(y) * stride + pad;
      ops.blur_column(rows, kernel, size, width, row);
      for (int x = 1; x <= pad; ++x) {
        row[-x] = row[x];
        row[width - 1 + x] = row[width - 1 - x];
      }
    }
    for (int y = 0; y < height; ++y) {
      ops.blur_row(padded + static_cast<int64_t>(y) * stride, kernel, size, width,
                   plane + static_cast<int64_t>(y) * width);
    }
  }
}

void prepare_normalize(const ViewOptions& options, Buffers& buffers) {
  const bool same = std::equal(options.mean, options.mean + 3, buffers.mean) &&
                    std::equal(options.std, options.std + 3, buffers.std);
  const bool wants_table = options.dtype == DType::kBfloat16 || options.dtype == DType::kFloat16;
  if (same && (!wants_table || options.dtype == buffers.table_dtype)) return;
  for (int c = 0; c < 3; ++c) {
    buffers.scale[c] = static_cast<float>(1.0 / (255.0 * options.std[c]));
    buffers.offset[c] = static_cast<float>(-static_cast<double>(options.mean[c]) / options.std[c]);
    buffers.mean[c] = options.mean[c];
    buffers.std[c] = options.std[c];
    for (int value = 0; wants_table && value < 256; ++value) {
      const float x = static_cast<float>(value) * buffers.scale[c] + buffers.offset[c];
      buffers.table[c][value] = options.dtype == DType::kBfloat16 ? to_bfloat16(x) : to_float16(x);
    }
  }
  buffers.table_dtype = wants_table ? options.dtype : DType::kUint8;
}

void store(const ViewOptions& options, int pixels, const PixelOps& ops, Buffers& buffers,
           Planes planes, void* out) {
  if (options.dtype == DType::kUint8) {
    ops.store_uint8(planes, pixels, static_cast<uint8_t*>(out));
    return;
  }
  prepare_normalize(options, buffers);
  if (options.dtype == DType::kFloat32) {
    ops.store_float(planes, pixels, buffers.scale, buffers.offset, static_cast<float*>(out));
  } else {
    ops.store_table(planes, pixels, buffers.table, static_cast<uint16_t*>(out));
  }
}

}  // namespace

int64_t dtype_size(DType dtype) {
  return dtype == DType::kUint8 ? 1 : dtype == DType::kFloat32 ? 4 : 2;
}

int auto_blur_kernel(int out_h, int out_w) {
  const int shorter = std::min(out_h, out_w);
  return shorter < 2 ? 1 : std::max(3, (shorter / 10) | 1);
}

void check_options(const ViewOptions& options) {
  if (options.out_h <= 0 || options.out_w <= 0 || options.out_h > kLargestPatch ||
      options.out_w > kLargestPatch) {
    reject("the patch size is " + std::to_string(options.out_h) + " x " +
           std::to_string(options.out_w) + "; expected 1.." + std::to_string(kLargestPatch));
  }
  if (options.blur_kernel < 0 || (options.blur_kernel != 0 && options.blur_kernel % 2 == 0)) {
    reject("blur_kernel is " + std::to_string(options.blur_kernel) +
           "; expected an odd number of pixels, or 0 for a tenth of the patch");
  }
  for (int c = 0; c < 3; ++c) {
    if (!std::isfinite(options.mean[c]) || !std::isfinite(options.std[c]) ||
        !(options.std[c] > 0)) {
      reject("channel " + std::to_string(c) + " has mean " + std::to_string(options.mean[c]) +
             " and std " + std::to_string(options.std[c]) +
             "; expected finite numbers and std > 0");
    }
  }
}

Scratch::Scratch() : buffers_(std::make_unique<Buffers>()) {}
Scratch::~Scratch() = default;
Scratch::Scratch(Scratch&&) noexcept = default;
Scratch& Scratch::operator=(Scratch&&) noexcept = default;

void patch_view(const ImageView& image, const ViewParams& params, const ViewOptions& options,
                void* out, Scratch& scratch) {
  check_options(options);
  check_box(image, params);
  check_view(params, options);

  const PixelOps& ops = pixel_ops();
  Buffers& buffers = scratch.buffers();
  const int pixels = options.out_h * options.out_w;
  Planes planes;
  planes.size = (pixels + kPlanePadding - 1) / kPlanePadding * kPlanePadding;
  const int64_t spacing = planes.size + kWidthPadding;
  float* first = at_least(buffers.planes, 3 * static_cast<size_t>(spacing));
  for (int c = 0; c < 3; ++c) planes.channel[c] = first + c * spacing;

  resize(image, params, options, ops, buffers, planes);
  if (params.order >= 0.0f) jitter(params, pixels, ops, planes);
  if (params.grayscale != 0.0f) ops.grayscale(planes);
  if (params.blur_sigma > 0.0f) blur(params.blur_sigma, options, ops, buffers, planes);
  if (params.solarize < 256.0f) ops.solarize(planes, params.solarize);
  store(options, pixels, ops, buffers, planes, out);
}

}  // namespace bagssl
