#include "add_relu.h"

#include <algorithm>
#include <vector>

#include "padded_reader.h"

namespace bagssl {
namespace {

/// Some rows of pixels [rows, channels], and how they are read.
struct AddPart {
  const float *y, *identity;
  int64_t rows, channels;
  Reader of_y, of_identity;
};

}  // namespace
}  // namespace bagssl

#define BAGSSL_BODY "add_relu_body.h"
#include "simd_levels.h"

namespace bagssl {
namespace {

constexpr int64_t kFloatsTogether = 1 << 15;  // summed in float32 before all are in double

/// work(part, first float, number of the part) for all parts.
template <typename Work>
void for_parts(const DeferredMaps& x, const Identity& identity, int64_t rows, int64_t channels,
               ThreadPool& pool, Work work) {
  const PaddedReader of_y(x, channels), of_identity(identity.maps, channels);
  const int64_t together = std::max<int64_t>(1, kFloatsTogether / channels);
  pool.parallel_for((rows + together - 1) / together, [&](int, int64_t part) {
    const int64_t first = part * together, at = first * channels;
    work(AddPart{x.y + at, identity.maps.y + at, std::min(together, rows - first), channels,
                 of_y.get(), of_identity.get()},
         at, part);
  });
}

}  // namespace

void add_relu(const DeferredMaps& x, const Identity& identity, int64_t rows, int64_t channels,
              float* out, ThreadPool& pool) {
  for_parts(x, identity, rows, channels, pool, [&](const AddPart& part, int64_t at, int64_t) {
    BAGSSL_PICK(add)(part, identity.relu, out + at);
  });
}

void add_relu_backward(const float* dout, const float* out, const DeferredMaps& x,
                       const Identity& identity, int64_t rows, int64_t channels,
                       const AddReluResults& results, ThreadPool& pool) {
  const int64_t padded = channels + 16, together = std::max<int64_t>(1, kFloatsTogether / channels);
  const int64_t parts = (rows + together - 1) / together;
  std::vector<float> sums(parts * 4 * padded);
  for_parts(x, identity, rows, channels, pool, [&](const AddPart& part, int64_t at, int64_t n) {
    BAGSSL_PICK(gradients)
    (part, identity.relu, dout + at, out + at, results.dy + at, results.didentity + at,
     sums.data() + n * 4 * padded, padded);
  });
  float* const to[4] = {results.dscale, results.dshift, results.didentity_scale,
                        results.didentity_shift};
  for (int64_t which = 0; which < (identity.maps.scale ? 4 : 2); ++which) {
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += sums[(part * 4 + which) * padded + c];
      to[which][c] = static_cast<float>(sum);
    }
  }
}

}  // namespace bagssl
