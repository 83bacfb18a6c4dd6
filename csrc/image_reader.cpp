#include "image_reader.h"

#include <stdexcept>
#include <string>

#include "jpeg.h"

namespace bagssl {

struct ImageReader::Jpeg {
#ifdef BAGSSL_WITH_JPEG
  JpegDecoder decoder;
#endif
};

ImageReader::ImageReader(FallbackDecoder fallback, const Limits& limits)
    : fallback_(std::move(fallback)), limits_(limits), jpeg_(std::make_unique<Jpeg>()) {}
ImageReader::~ImageReader() = default;
ImageReader::ImageReader(ImageReader&&) noexcept = default;

void ImageReader::check_size(ImageSize size) const {
  if (size.height < 1 || size.width < 1) throw std::runtime_error("the image has no pixels");
  if (size.height > limits_.max_pixels / size.width) {
    throw std::runtime_error("an image of " + std::to_string(size.width) + " x " +
                             std::to_string(size.height) + " pixels exceeds the limit of " +
                             std::to_string(limits_.max_pixels) + " pixels (raise max_pixels)");
  }
}

ImageSize ImageReader::open(const Item& item) {
  item_ = item;
  is_native_jpeg_ = false;
  if (item.is_pixels()) {
    size_ = {item.height, item.width};
    check_size(size_);
    return size_;
  }
  if (item.size == 0) throw std::runtime_error("the file is empty (0 bytes)");
#ifdef BAGSSL_WITH_JPEG
  if (looks_like_jpeg(item.data, item.size)) {
    is_native_jpeg_ = true;
    size_ = jpeg_->decoder.open(item.data, item.size, limits_.max_scans);
    check_size(size_);
    return size_;
  }
#else
  if (looks_like_jpeg(item.data, item.size) &&
      count_scans(item.data, item.size) > limits_.max_scans) {
    throw std::runtime_error(too_many_scans(limits_.max_scans));
  }
#endif
  if (!fallback_)
    throw std::runtime_error("not a JPEG, and no decoder for other formats was given");
  size_ = fallback_(item.data, item.size, limits_.max_pixels, pixels_);
  check_size(size_);
  return size_;
}

Region ImageReader::decode() { return decode({0, 0, size_.height, size_.width}); }

Region ImageReader::decode(const Box& box, int denominator) {
  if (box.top < 0 || box.left < 0 || box.height < 1 || box.width < 1 ||
      box.height > size_.height - box.top || box.width > size_.width - box.left) {
    throw std::invalid_argument("the box is not within the image");
  }
#ifdef BAGSSL_WITH_JPEG
  if (is_native_jpeg_) return jpeg_->decoder.decode(box, denominator);
#else
  static_cast<void>(denominator);
#endif
  Region region;
  if (!item_.is_pixels()) {
    region.view = {pixels_.data(), size_.height, size_.width, size_.width * 3};
  } else if (item_.channels == 3) {
    region.view = {item_.data, size_.height, size_.width, size_.width * 3};
  } else {
    uint8_t* rgb = pixels_.take(static_cast<size_t>(size_.height * size_.width * 3));
    for (int64_t i = 0; i < size_.height * size_.width; ++i) {
      rgb[3 * i] = rgb[3 * i + 1] = rgb[3 * i + 2] = item_.data[i];
    }
    region.view = {rgb, size_.height, size_.width, size_.width * 3};
  }
  return region;
}

}  // namespace bagssl
