#include "view_params.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "philox.h"

namespace bagssl {
namespace {

// Where each quantity lives in a view's random stream: a block is four 32-bit words. The tries of
// the crop take one block each, from kCropBlock on.
constexpr uint32_t kGateBlock = 0;    // flip, jitter, grayscale, blur
constexpr uint32_t kFactorBlock = 1;  // brightness, contrast, saturation, hue
constexpr uint32_t kOtherBlock = 2;   // order, blur sigma, solarize, -
constexpr uint32_t kCropBlock = 3;    // area, ratio, top, left
constexpr int kCropTries = 10;
constexpr int kOrders = 24;

class ViewStream {
 public:
  explicit ViewStream(const ViewKey& key)
      : counter_{static_cast<uint32_t>(key.patch << 8), static_cast<uint32_t>(key.image),
                 static_cast<uint32_t>(key.image >> 32), static_cast<uint32_t>(key.epoch)},
        key_{static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32)} {}

  PhiloxCounter block(uint32_t index) const {
    PhiloxCounter counter = counter_;
    counter[0] |= index;
    return philox4x32(counter, key_);
  }

 private:
  PhiloxCounter counter_;
  PhiloxKey key_;
};

double uniform(uint32_t bits, double low, double high) {
  return low + (high - low) * uniform01(bits);
}

/// ColorJitter's factor for a strength: [max(0, 1 - strength), 1 + strength].
float jitter_factor(uint32_t bits, double strength) {
  return static_cast<float>(uniform(bits, std::max(0.0, 1.0 - strength), 1.0 + strength));
}

/// Python's round(): halves go to the even neighbor.
int64_t round_half_even(double x) { return static_cast<int64_t>(std::nearbyint(x)); }

void set_box(ViewParams& view, int64_t top, int64_t left, int64_t height, int64_t width) {
  view.top = static_cast<float>(top);
  view.left = static_cast<float>(left);
  view.height = static_cast<float>(height);
  view.width = static_cast<float>(width);
}

void draw_box(const AugmentSpec& spec, int64_t height, int64_t width, const ViewStream& stream,
              ViewParams& view) {
  const double area = static_cast<double>(height) * static_cast<double>(width);
  const double log_low = std::log(spec.ratio[0]), log_high = std::log(spec.ratio[1]);
  for (int attempt = 0; attempt < kCropTries; ++attempt) {
    const PhiloxCounter bits = stream.block(kCropBlock + attempt);
    const double crop_area = area * uniform(bits[0], spec.scale[0], spec.scale[1]);
    const double ratio =
        log_low == log_high ? spec.ratio[0] : std::exp(uniform(bits[1], log_low, log_high));
    const int64_t w = round_half_even(std::sqrt(crop_area * ratio));
    const int64_t h = round_half_even(std::sqrt(crop_area / ratio));
    if (w > 0 && w <= width && h > 0 && h <= height) {
      set_box(view, uniform_below(bits[2], height - h + 1), uniform_below(bits[3], width - w + 1),
              h, w);
      return;
    }
  }
  // The central crop whose ratio comes nearest.
  const double image_ratio = static_cast<double>(width) / static_cast<double>(height);
  int64_t h = height, w = width;
  if (image_ratio < spec.ratio[0]) {
    h = std::clamp<int64_t>(round_half_even(static_cast<double>(w) / spec.ratio[0]), 1, height);
  } else if (image_ratio > spec.ratio[1]) {
    w = std::clamp<int64_t>(round_half_even(static_cast<double>(h) * spec.ratio[1]), 1, width);
  }
  set_box(view, (height - h) / 2, (width - w) / 2, h, w);
}

void check_size(const char* what, int64_t height, int64_t width) {
  // Box corners live in float32 columns, which hold integers up to 2^24 exactly.
  constexpr int64_t kLargest = int64_t{1} << 24;
  if (height <= 0 || width <= 0 || height > kLargest || width > kLargest) {
    throw std::invalid_argument(std::string(what) + ": the image is " + std::to_string(height) +
                                " x " + std::to_string(width) +
                                " pixels; height and width must lie in 1..2^24");
  }
}

void check_range(const char* name, double low, double high, double least, double most) {
  if (!(low >= least && high <= most && low <= high)) {
    throw std::invalid_argument(std::string("augment: ") + name + " is (" + std::to_string(low) +
                                ", " + std::to_string(high) + "); expected low <= high within [" +
                                std::to_string(least) + ", " + std::to_string(most) + "]");
  }
}

void check_value(const char* name, double value, double least, double most) {
  if (!(value >= least && value <= most)) {
    throw std::invalid_argument(std::string("augment: ") + name + " is " + std::to_string(value) +
                                "; expected a number in [" + std::to_string(least) + ", " +
                                std::to_string(most) + "]");
  }
}

}  // namespace

void check_spec(const AugmentSpec& spec) {
  constexpr double kTiny = 1e-9, kHuge = 1e9;
  check_range("scale", spec.scale[0], spec.scale[1], kTiny, 1);
  check_range("ratio", spec.ratio[0], spec.ratio[1], kTiny, kHuge);
  check_value("hflip", spec.hflip, 0, 1);
  check_value("brightness", spec.brightness, 0, kHuge);
  check_value("contrast", spec.contrast, 0, kHuge);
  check_value("saturation", spec.saturation, 0, kHuge);
  check_value("hue", spec.hue, 0, 0.5);
  check_value("jitter_prob", spec.jitter_prob, 0, 1);
  check_value("grayscale_prob", spec.grayscale_prob, 0, 1);
  check_value("blur_prob", spec.blur_prob, 0, 1);
  check_range("blur_sigma", spec.blur_sigma[0], spec.blur_sigma[1], kTiny, kHuge);
  check_value("solarize_prob", spec.solarize_prob, 0, 1);
  check_value("solarize_threshold", spec.solarize_threshold, 0, 256);
}

ViewParams draw_view(const AugmentSpec& spec, int64_t height, int64_t width, const ViewKey& key) {
  check_size("draw_view", height, width);
  if (key.epoch >> 32 != 0 || key.patch >> 24 != 0) {
    throw std::invalid_argument("draw_view: the key has epoch " + std::to_string(key.epoch) +
                                " and patch " + std::to_string(key.patch) +
                                "; expected epoch < 2^32 and patch < 2^24");
  }
  const ViewStream stream(key);
  ViewParams view;
  draw_box(spec, height, width, stream, view);

  const PhiloxCounter gates = stream.block(kGateBlock);
  const PhiloxCounter others = stream.block(kOtherBlock);
  view.flip = uniform01(gates[0]) < spec.hflip ? 1.0f : 0.0f;
  if (uniform01(gates[1]) < spec.jitter_prob) {
    const PhiloxCounter factors = stream.block(kFactorBlock);
    view.brightness = jitter_factor(factors[0], spec.brightness);
    view.contrast = jitter_factor(factors[1], spec.contrast);
    view.saturation = jitter_factor(factors[2], spec.saturation);
    view.hue = static_cast<float>(uniform(factors[3], -spec.hue, spec.hue));
    view.order = static_cast<float>(uniform_below(others[0], kOrders));
  }
  view.grayscale = uniform01(gates[2]) < spec.grayscale_prob ? 1.0f : 0.0f;
  if (uniform01(gates[3]) < spec.blur_prob) {
    view.blur_sigma =
        static_cast<float>(uniform(others[1], spec.blur_sigma[0], spec.blur_sigma[1]));
  }
  if (uniform01(others[2]) < spec.solarize_prob) {
    view.solarize = static_cast<float>(spec.solarize_threshold);
  }
  return view;
}

ViewParams grid_view(const AugmentSpec& spec, int64_t height, int64_t width, int64_t patches,
                     int64_t index) {
  check_size("grid_view", height, width);
  const int64_t n = patches > 0 ? round_half_even(std::sqrt(static_cast<double>(patches))) : 0;
  if (patches <= 0 || n * n != patches || index < 0 || index >= patches) {
    throw std::invalid_argument("grid_view: patch " + std::to_string(index) + " of " +
                                std::to_string(patches) +
                                "; expected 0 <= patch < patches and a square number of patches "
                                "(1, 4, 9, 16, 25, ...)");
  }
  const double area = static_cast<double>(height) * static_cast<double>(width);
  const double scale = (spec.scale[0] + spec.scale[1]) / 2;
  const int64_t side =
      std::clamp<int64_t>(round_half_even(std::sqrt(scale * area)), 1, std::min(height, width));
  const auto position = [n, side](int64_t i, int64_t size) {
    return n == 1 ? (size - side) / 2 : (2 * i * (size - side) + (n - 1)) / (2 * (n - 1));
  };
  ViewParams view;
  set_box(view, position(index / n, height), position(index % n, width), side, side);
  return view;
}

ViewParams center_view(int64_t height, int64_t width) {
  check_size("center_view", height, width);
  const int64_t side = std::min(height, width);
  ViewParams view;
  set_box(view, (height - side) / 2, (width - side) / 2, side, side);
  return view;
}

}  // namespace bagssl
