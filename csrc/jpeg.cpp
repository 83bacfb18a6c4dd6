#include "jpeg.h"

#include <cstring>

namespace bagssl {
namespace {

uint32_t read_number(const uint8_t* data, int bytes, bool big_endian) {
  uint32_t value = 0;
  for (int i = 0; i < bytes; ++i) {
    value = value << 8 | data[big_endian ? i : bytes - 1 - i];
  }
  return value;
}

}  // namespace

bool looks_like_jpeg(const uint8_t* data, size_t size) {
  return size >= 3 && data[0] == 0xFF && data[1] == 0xD8 && data[2] == 0xFF;
}

bool has_native_jpeg() {
#ifdef BAGSSL_WITH_JPEG
  return true;
#else
  return false;
#endif
}

bool is_exif(const uint8_t* segment, size_t size) {
  return size >= 6 && std::memcmp(segment, "Exif\0\0", 6) == 0;
}

int exif_orientation(const uint8_t* segment, size_t size) {
  constexpr int kOrientationTag = 0x0112, kShort = 3;
  if (size < 14 || !is_exif(segment, size)) return 1;
  const uint8_t* tiff = segment + 6;
  const size_t end = size - 6;
  const bool big = tiff[0] == 'M';
  if (std::memcmp(tiff, big ? "MM\0*" : "II*\0", 4) != 0) return 1;
  const size_t directory = read_number(tiff + 4, 4, big);
  if (directory > end || end - directory < 2) return 1;
  const size_t entries = read_number(tiff + directory, 2, big);
  for (size_t i = 0; i < entries; ++i) {
    const size_t at = directory + 2 + 12 * i;
    if (at + 12 > end) return 1;
    if (read_number(tiff + at, 2, big) != kOrientationTag) continue;
    if (read_number(tiff + at + 2, 2, big) != kShort) return 1;
    const uint32_t value = read_number(tiff + at + 8, 2, big);
    return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
  }
  return 1;
}

}  // namespace bagssl
