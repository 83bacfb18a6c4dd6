#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace bagssl {

/// The upper half of a float32's bits.
using BFloat16 = uint16_t;

/// Rounded to the nearest, of two the even one.
inline BFloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return static_cast<BFloat16>(bits >> 16 | 0x40);
  return static_cast<BFloat16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace bagssl
