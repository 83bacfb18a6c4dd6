#pragma once

#include <optional>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define BAGSSL_X86 1  // loops are also compiled for AVX2 and AVX-512
#endif

namespace bagssl {

/// The instruction sets that loops are compiled for; a higher one includes those below it.
enum class SimdLevel {
  kBaseline,  ///< what every processor of the architecture has: SSE2, on arm64 NEON
  kAvx2,      ///< x86-64: AVX2, FMA
  kAvx512,    ///< x86-64: also AVX-512 F, DQ, BW, VL
};

/// The names of the levels that this machine can run, lowest first.
std::vector<std::string> simd_levels();

/// The level in force: the highest, or that of the environment variable BAGSSL_SIMD, which is read
/// once. Throws std::invalid_argument if the variable names none of simd_levels().
SimdLevel simd_level();
std::string simd_level_name();

/// Puts the level of this name in force for the whole process; without a name, the one that
/// simd_level() began with. Throws std::invalid_argument if it is none of simd_levels().
void force_simd_level(const std::optional<std::string>& name);

/// The one of three pointers that is for the level in force. See simd_levels.h.
template <typename Pointer>
Pointer pick_level(Pointer baseline, Pointer avx2, Pointer avx512) {
  const SimdLevel level = simd_level();
  return level == SimdLevel::kAvx512 ? avx512 : level == SimdLevel::kAvx2 ? avx2 : baseline;
}

}  // namespace bagssl
