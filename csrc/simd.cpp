#include "simd.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace bagssl {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

int highest() {
#ifdef BAGSSL_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx512 ? 2 : 1;
#else
  return 0;
#endif
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
