#pragma once

#include <optional>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define BAGSSL_X86 1  // loops are also compiled for AVX2 and AVX-512
#if defined(__clang__) || __GNUC__ >= 11
#define BAGSSL_X86_BF16 1  // and those of bfloat16 for its instructions
#endif
#endif

namespace bagssl {

/// The instruction sets that loops are compiled for; a higher one includes those below it.
enum class SimdLevel {
  kBaseline,  ///< what every processor of the architecture has: SSE2, on arm64 NEON
  kAvx2,      ///< x86-64: AVX2, FMA
  kAvx512,    ///< x86-64: also AVX-512 F, DQ, BW, VL
  // These differ from the one before in the loops of bfloat16 alone:
  kAvx512Bf16,  ///< also AVX512_BF16
  kAmx,         ///< also AMX_TILE, AMX_BF16, where the system lets the process use them
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

/// The one of some pointers that is for the level in force. See simd_levels.h.
template <typename Pointer>
Pointer pick_level(Pointer baseline, Pointer avx2, Pointer avx512, Pointer avx512_bf16,
                   Pointer amx) {
  const Pointer of_level[] = {baseline, avx2, avx512, avx512_bf16, amx};
  return of_level[static_cast<int>(simd_level())];
}

}  // namespace bagssl
