#include "simd.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef BAGSSL_X86_BF16
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace bagssl {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

#ifdef BAGSSL_X86_BF16
struct Cpuid {
  unsigned eax, ebx, ecx, edx;
  Cpuid(unsigned leaf, unsigned part) { __cpuid_count(leaf, part, eax, ebx, ecx, edx); }
};

bool has_bf16() { return Cpuid(0, 0).eax >= 7 && (Cpuid(7, 1).eax >> 5 & 1) != 0; }

/// Whether there are tiles, and the kernel keeps them: it does for a process that asks once.
bool has_amx() {
  constexpr unsigned kBf16 = 1 << 22, kTiles = 1 << 24;
  if ((Cpuid(7, 0).edx & (kBf16 | kTiles)) != (kBf16 | kTiles)) return false;
#ifdef __linux__
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}
#endif

int find_highest() {
#ifdef BAGSSL_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return 1;
#ifdef BAGSSL_X86_BF16
  if (has_bf16()) return has_amx() ? 4 : 3;
#endif
  return 2;
#else
  return 0;
#endif
}

int highest() {
  static const int level = find_highest();
  return level;
}

SimdLevel named(const std::string& what, const std::string& name) {
  std::string known;
  for (int level = 0; level <= highest(); ++level) {
    if (name == kNames[level]) return static_cast<SimdLevel>(level);
    known += (level > 0 ? ", " : "") + std::string(kNames[level]);
  }
  throw std::invalid_argument(what + " is \"" + name +
                              "\"; expected a level that this machine can run: " + known);
}

SimdLevel initial_level() {
  static const SimdLevel level = [] {
    const char* name = std::getenv("BAGSSL_SIMD");
    if (name == nullptr || *name == '\0') return static_cast<SimdLevel>(highest());
    return named("the environment variable BAGSSL_SIMD", name);
  }();
  return level;
}

std::atomic<SimdLevel>& level_in_force() {
  static std::atomic<SimdLevel> level{initial_level()};
  return level;
}

}  // namespace

std::vector<std::string> simd_levels() { return {kNames, kNames + highest() + 1}; }

SimdLevel simd_level() { return level_in_force().load(std::memory_order_relaxed); }

std::string simd_level_name() { return kNames[static_cast<int>(simd_level())]; }

void force_simd_level(const std::optional<std::string>& name) {
  level_in_force() = name ? named("the SIMD level", *name) : initial_level();
}

}  // namespace bagssl
