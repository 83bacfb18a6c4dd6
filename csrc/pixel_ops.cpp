#include "pixel_ops.h"

#include <atomic>

namespace bagssl {
namespace {

const PixelOps* best_table() {
#ifdef BAGSSL_HAS_V3
  __builtin_cpu_init();  // this may run before the C++ runtime has asked
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kV3PixelOps;
#endif
  return &kBaselinePixelOps;
}

std::atomic<const PixelOps*> current_table{best_table()};

}  // namespace

const PixelOps& pixel_ops() { return *current_table.load(std::memory_order_relaxed); }

void force_baseline_pixel_ops(bool force) {
  current_table = force ? &kBaselinePixelOps : best_table();
}

}  // namespace bagssl
