#include "instruction_set.h"

#include <atomic>

namespace bagssl {
namespace {

bool has_v3() {
#ifdef BAGSSL_HAS_V3
  __builtin_cpu_init();  // this may run before the C++ runtime has asked
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

std::atomic<bool> v3{has_v3()};

}  // namespace

bool use_v3() { return v3.load(std::memory_order_relaxed); }

void force_baseline(bool force) { v3 = !force && has_v3(); }

}  // namespace bagssl
