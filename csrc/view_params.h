#pragma once

#include <cstdint>

namespace bagssl {

/// What one patch is made of: a row of the float32 table [P, B, 16] that every implementation
/// reads. Stages run in this order: crop + resize, flip, jitter, grayscale, blur, solarize.
struct ViewParams {
  float top = 0, left = 0, height = 0, width = 0;  ///< crop box in source pixels, integers
  float flip = 0;                                  ///< 1: mirror left and right
  float brightness = 1, contrast = 1, saturation = 1, hue = 0;  ///< used when order >= 0
  float order = -1;      ///< which lexicographic permutation of the four; -1: no jitter
  float grayscale = 0;   ///< 1: gray
  float blur_sigma = 0;  ///< 0: no blur
  float solarize = 256;  ///< values >= this are inverted; 256: none
  float reserved[3] = {0, 0, 0};
};
constexpr int kViewParams = 16;
static_assert(sizeof(ViewParams) == kViewParams * sizeof(float), "the table has 16 columns");

/// The distribution views are drawn from; names and meanings are torchvision's
/// (RandomResizedCrop, RandomHorizontalFlip, ColorJitter, RandomGrayscale, GaussianBlur,
/// RandomSolarize). The default draws the whole image and changes nothing.
struct AugmentSpec {
  double scale[2] = {1, 1};                             ///< crop area over image area
  double ratio[2] = {1, 1};                             ///< crop width over height, log-uniform
  double hflip = 0;                                     ///< probability
  double brightness = 0, contrast = 0, saturation = 0;  ///< factor in [max(0, 1 - x), 1 + x]
  double hue = 0;                                       ///< shift in [-x, x], x <= 0.5
  double jitter_prob = 0;
  double grayscale_prob = 0;
  double blur_prob = 0;
  double blur_sigma[2] = {0.1, 2.0};
  double solarize_prob = 0;
  double solarize_threshold = 128;
};

/// What a draw depends on, and nothing else: not the batch, the rank or the thread.
struct ViewKey {
  uint64_t seed = 0;
  uint64_t epoch = 0;  ///< < 2^32
  uint64_t image = 0;  ///< index in the data set
  uint64_t patch = 0;  ///< < 2^24
};

/// Throws std::invalid_argument naming the first field that makes no sense.
void check_spec(const AugmentSpec& spec);

/// Draws a view of an image of height x width pixels. Every quantity has its own place in the
/// random stream, so that changing one probability leaves all other draws as they were.
/// Throws std::invalid_argument for sizes <= 0 and keys out of range; does not check the spec.
ViewParams draw_view(const AugmentSpec& spec, int64_t height, int64_t width, const ViewKey& key);

/// Box `index` (row-major) of `patches` = n * n square boxes spread evenly over the image, whose
/// side is that of the mean scale, sqrt(mean(scale) * height * width), at most the shorter side.
/// One patch is the central box. No augmentation.
/// Throws std::invalid_argument if `patches` is no square number or an argument is out of range.
ViewParams grid_view(const AugmentSpec& spec, int64_t height, int64_t width, int64_t patches,
                     int64_t index);

/// The central square of the image, as large as fits. No augmentation.
ViewParams center_view(int64_t height, int64_t width);

}  // namespace bagssl
