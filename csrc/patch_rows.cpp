#include "patch_rows.h"

#include <algorithm>

#include "clones.h"

namespace bagssl {
namespace {

constexpr int64_t kPatches = 32;  // handed to a thread together

template <typename T>
inline __attribute__((always_inline)) void cut(const PatchRows& rows, int64_t first, int64_t last,
                                               T* __restrict out) {
  const T center = static_cast<T>(rows.center);
  for (int64_t i = first; i < last; ++i) {
    for (int64_t line = 0; line < rows.lines; ++line) {
      const uint8_t* from = rows.pixels + rows.offsets[i] + line * rows.stride;
      T* to = out + (i * rows.lines + line) * rows.length;
      for (int64_t j = 0; j < rows.length; ++j) to[j] = static_cast<T>(from[j]) - center;
    }
  }
}

BAGSSL_CLONES void cut_of(const PatchRows& rows, int64_t first, int64_t last, float* out) {
  cut(rows, first, last, out);
}
BAGSSL_CLONES void cut_of(const PatchRows& rows, int64_t first, int64_t last, double* out) {
  cut(rows, first, last, out);
}

}  // namespace

template <typename T>
void patch_rows(const PatchRows& rows, T* out, ThreadPool& pool) {
  pool.parallel_for((rows.count + kPatches - 1) / kPatches, [&](int, int64_t i) {
    cut_of(rows, i * kPatches, std::min((i + 1) * kPatches, rows.count), out);
  });
}

template void patch_rows(const PatchRows&, float*, ThreadPool&);
template void patch_rows(const PatchRows&, double*, ThreadPool&);

}  // namespace bagssl
