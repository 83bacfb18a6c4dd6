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

int count_scans(const uint8_t* data, size_t size) {
  constexpr uint8_t kStuffed = 0x00, kAlone = 0x01, kRestart0 = 0xD0, kStart = 0xD8, kEnd = 0xD9,
                    kScan = 0xDA;
  int scans = 0;
  const uint8_t* const end = data + size;
  const uint8_t* at = data;
  while (at < end) {
    at = static_cast<const uint8_t*>(std::memchr(at, 0xFF, static_cast<size_t>(end - at)));
    if (at == nullptr) break;
    while (at < end && *at == 0xFF) ++at;
    if (at == end) break;
    const uint8_t marker = *at++;
    if (marker == kEnd) break;
    if (marker == kStuffed || marker == kAlone || (marker >= kRestart0 && marker <= kStart))
      continue;
    if (marker == kScan) ++scans;
    if (end - at < 2) break;
    const auto length = static_cast<ptrdiff_t>(read_number(at, 2, true));
    if (length > end - at) break;
    at += length;
  }
  return scans;
}

std::string too_many_scans(int max_scans) {
  return "a JPEG of more than " + std::to_string(max_scans) + " scans (raise max_scans)";
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
