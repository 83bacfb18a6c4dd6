#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "byte_buffer.h"
#include "image.h"

namespace bagssl {

/// Whether the bytes begin as every JPEG does.
bool looks_like_jpeg(const uint8_t* data, size_t size);

/// Whether this build decodes JPEG itself (libjpeg-turbo was found when it was compiled).
bool has_native_jpeg();

/// How many scans a JPEG has: each one is a pass over the whole image, however few bytes it has.
int count_scans(const uint8_t* data, size_t size);

/// What is said of a file that has more than `max_scans`.
std::string too_many_scans(int max_scans);

/// Whether the contents of an APP1 segment are EXIF; XMP stands in such segments, too.
bool is_exif(const uint8_t* segment, size_t size);

/// EXIF's orientation, 1 (upright) to 8, of the contents of an APP1 segment; 1 where it has none.
int exif_orientation(const uint8_t* segment, size_t size);

#ifdef BAGSSL_WITH_JPEG

/// Decodes JPEG files to RGB, whole or in part, with libjpeg-turbo: accurate integer DCT and smooth
/// chroma upsampling, so that the pixels are those of a full decode by any libjpeg-turbo.
///
/// One per thread; its state is kept from file to file. Throws std::runtime_error with the reason
/// where a file cannot be decoded. What is truncated is an error; what libjpeg merely warns about
/// is not (Pillow's rule).
class JpegDecoder {
 public:
  JpegDecoder();
  ~JpegDecoder();
  JpegDecoder(const JpegDecoder&) = delete;
  JpegDecoder& operator=(const JpegDecoder&) = delete;

  /// Reads the header of a file, which must stay in place until `decode` has returned. Returns its
  /// size as it is to be seen: turned upright as EXIF says. `decode` refuses a file of more than
  /// `max_scans` scans.
  ImageSize open(const uint8_t* data, size_t size, int max_scans);

  /// Decodes the part of the opened image that `box` (in upright pixels, within the image) covers.
  /// Rows below it are not decoded, columns and rows around it cost next to nothing.
  ///
  /// `denominator` 1, 2, 4 or 8 asks for an image scaled by 1/denominator in the DCT; the box is
  /// still in full pixels and the region returned in scaled ones.
  Region decode(const Box& box, int denominator = 1);

 private:
  struct State;  // libjpeg's structs
  Region decode_stored(const Box& box);
  void check_complete();
  [[noreturn]] void fail();

  std::unique_ptr<State> state_;
  int orientation_ = 1;
  ImageSize stored_;
  bool has_end_marker_ = false;
  ByteBuffer pixels_, upright_, inks_, spare_row_;
};

#endif  // BAGSSL_WITH_JPEG

}  // namespace bagssl
