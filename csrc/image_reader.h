#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "byte_buffer.h"
#include "image.h"
#include "source.h"

namespace bagssl {

/// Decodes a whole file of a format that this library does not decode itself into `pixels`, uint8
/// [height, width, 3]. It must refuse images of more than `max_pixels` before allocating memory for
/// them, rotate them upright, and throw std::runtime_error with the reason if it fails. Called from
/// many threads at once.
using FallbackDecoder = std::function<ImageSize(const uint8_t* data, size_t size,
                                                int64_t max_pixels, ByteBuffer& pixels)>;

/// Turns stored images into RGB pixels, one at a time: first its size, from which the views are
/// drawn, then the part that they need. One per thread; its buffers are reused for every image.
class ImageReader {
 public:
  /// Images that exceed `limits` are refused; the source that reads them looks at their bytes.
  ImageReader(FallbackDecoder fallback, const Limits& limits);
  ~ImageReader();
  ImageReader(ImageReader&&) noexcept;

  /// Opens an item, whose bytes must remain valid until `decode` has returned. Returns the size of
  /// the upright image. Throws std::runtime_error with the reason if it cannot be decoded.
  ImageSize open(const Item& item);

  /// The part of the opened image that `box` covers, or more of it. To be called once per `open`.
  /// `denominator` (1, 2, 4, 8) allows an image scaled down by that much, where the format can.
  Region decode(const Box& box, int denominator = 1);

  /// The whole opened image.
  Region decode();

 private:
  void check_size(ImageSize size) const;

  struct Jpeg;
  FallbackDecoder fallback_;
  Limits limits_;
  std::unique_ptr<Jpeg> jpeg_;
  Item item_;
  ImageSize size_;
  bool is_native_jpeg_ = false;
  ByteBuffer pixels_;  // of other decoders, and of gray made RGB
};

}  // namespace bagssl
