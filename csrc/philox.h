#pragma once

#include <array>
#include <cstdint>

namespace bagssl {

using PhiloxCounter = std::array<uint32_t, 4>;
using PhiloxKey = std::array<uint32_t, 2>;

/// Philox4x32-10: 128 random bits as a pure function of a 128-bit counter and a 64-bit key.
/// Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
inline PhiloxCounter philox4x32(PhiloxCounter counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<uint32_t>(product0)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

/// [0, 1) from 32 random bits; the top 24 are kept, so the result is exact in float and double.
inline double uniform01(uint32_t bits) { return (bits >> 8) * (1.0 / 16777216.0); }

/// An integer in [0, n), n < 2^32, by multiply and shift (bias below n / 2^32).
inline int64_t uniform_below(uint32_t bits, int64_t n) {
  return static_cast<int64_t>((uint64_t{bits} * static_cast<uint64_t>(n)) >> 32);
}

}  // namespace bagssl
