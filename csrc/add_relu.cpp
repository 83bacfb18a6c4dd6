#include "add_relu.h"

#include <algorithm>
#include <vector>

#include "padded_reader.h"

namespace bagssl {
namespace {

/// Some rows of pixels [rows, channels], and how they are read.
template <typename Number>
struct AddPart {
  const Number *y, *identity;
  int64_t rows, channels;
  Reader of_y, of_identity;
};

}  // namespace
}  // namespace bagssl

#define BAGSSL_BODY "add_relu_body.h"
#define BAGSSL_UP_TO_AMX
#include "simd_levels.h"

namespace bagssl {
namespace {

constexpr int64_t kFloatsTogether = 1 << 15;  // summed in float32 before all are in double

/// work(part, first float, number of the part) for all parts.
template <typename Number, typename Work>
void for_parts(const MapsOf<Number>& x, const Identity<Number>& identity, int64_t rows,
               int64_t channels, ThreadPool& pool, Work work) {
  const PaddedReader of_y(x, channels), of_identity(identity.maps, channels);
  const int64_t together = std::max<int64_t>(1, kFloatsTogether / channels);
  pool.parallel_for((rows + together - 1) / together, [&](int, int64_t part) {
    const int64_t first = part * together, at = first * channels;
    work(AddPart<Number>{x.y + at, identity.maps.y + at, std::min(together, rows - first), channels,
                         of_y.get(), of_identity.get()},
         at, part);
  });
}

}  // namespace

template <typename Number>
void add_relu(const MapsOf<Number>& x, const Identity<Number>& identity, int64_t rows,
              int64_t channels, Number* out, ThreadPool& pool) {
  for_parts(x, identity, rows, channels, pool, [&](const auto& part, int64_t at, int64_t) {
    BAGSSL_PICK(add<Number>)(part, identity.relu, out + at);
  });
}

template <typename Number>
void add_relu_backward(const Number* dout, const Number* out, const MapsOf<Number>& x,
                       const Identity<Number>& identity, int64_t rows, int64_t channels,
                       const AddReluResults<Number>& results, ThreadPool& pool) {
  const int64_t padded = channels + 16, together = std::max<int64_t>(1, kFloatsTogether / channels);
  const int64_t parts = (rows + together - 1) / together;
  std::vector<float> sums(parts * 4 * padded);
  for_parts(x, identity, rows, channels, pool, [&](const auto& part, int64_t at, int64_t n) {
    BAGSSL_PICK(gradients<Number>)
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

#define BAGSSL_INSTANTIATE(Number)                                                         \
  template void add_relu(const MapsOf<Number>&, const Identity<Number>&, int64_t, int64_t, \
                         Number*, ThreadPool&);                                            \
  template void add_relu_backward(const Number*, const Number*, const MapsOf<Number>&,     \
                                  const Identity<Number>&, int64_t, int64_t,               \
                                  const AddReluResults<Number>&, ThreadPool&);
BAGSSL_INSTANTIATE(float)
BAGSSL_INSTANTIATE(BFloat16)

}  // namespace bagssl
