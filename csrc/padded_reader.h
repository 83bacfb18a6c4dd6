#pragma once

#include <cstdint>
#include <vector>

#include "conv_bn_relu.h"

namespace bagssl {

/// relu(scale * x + shift) as it is computed on loading, null scale for x itself; center for the
/// sums of gradients. Each is padded to whole vectors of any SIMD level.
struct Reader {
  const float *scale, *shift, *center;
};

/// Owns the vectors of a Reader.
class PaddedReader {
 public:
  template <typename Number>
  PaddedReader(const MapsOf<Number>& x, int64_t channels)
      : size_(channels + 16), floats_(x.scale ? 3 * size_ : 0) {
    if (!x.scale) return;
    for (int64_t c = 0; c < channels; ++c) {
      const double shift = x.shift[c] - static_cast<double>(x.center[c]) * x.scale[c];
      floats_[c] = x.scale[c];
      floats_[size_ + c] = static_cast<float>(shift);
      floats_[2 * size_ + c] = x.center[c];
    }
  }

  Reader get() const {
    if (floats_.empty()) return {nullptr, nullptr, nullptr};
    return {floats_.data(), floats_.data() + size_, floats_.data() + 2 * size_};
  }

 private:
  int64_t size_;
  std::vector<float> floats_;
};

}  // namespace bagssl
