#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace bagssl {

/// Mean and centered squares of each channel, in double, joined by Chan's rule.
struct ChannelMoments {
  double count = 0;
  std::vector<double> mean, squares;

  explicit ChannelMoments(int64_t channels) : mean(channels), squares(channels) {}

  template <typename Number>
  void add(const Number* other_mean, const Number* other_squares, double other_count) {
    const double share = other_count / (count + other_count);
    for (size_t c = 0; c < mean.size(); ++c) {
      const double d = other_mean[c] - mean[c];
      mean[c] += d * share;
      squares[c] += other_squares[c] + d * d * count * share;
    }
    count += other_count;
  }

  void add(const ChannelMoments& other) {
    add(other.mean.data(), other.squares.data(), other.count);
  }
};

}  // namespace bagssl
