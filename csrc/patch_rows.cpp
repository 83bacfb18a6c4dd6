#include "patch_rows.h"

#include <algorithm>

#define BAGSSL_BODY "patch_rows_body.h"
#define BAGSSL_UP_TO_AVX2  // vectors of 64 bytes took up to twice as long: lines are short
#include "simd_levels.h"

namespace bagssl {
namespace {

constexpr int64_t kPatches = 32;  // handed to a thread together

}  // namespace

template <typename T>
void patch_rows(const PatchRows& rows, T* out, ThreadPool& pool) {
  const auto cut_some = BAGSSL_PICK(cut<T>);
  pool.parallel_for((rows.count + kPatches - 1) / kPatches, [&](int, int64_t i) {
    cut_some(rows, i * kPatches, std::min((i + 1) * kPatches, rows.count), out);
  });
}

template void patch_rows(const PatchRows&, float*, ThreadPool&);
template void patch_rows(const PatchRows&, double*, ThreadPool&);

}  // namespace bagssl
