#include "resize_weights.h"

#include <algorithm>
#include <cmath>

namespace bagssl {
namespace {

double filter(Interpolation interp, double x) {
  x = std::fabs(x);
  if (interp == Interpolation::kBilinear) return x < 1.0 ? 1.0 - x : 0.0;
  constexpr double a = -0.5;  // Pillow's and torch's choice with antialiasing
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
  return 0.0;
}

/// The most bits with which the largest weight still fits an int16.
int weight_precision(double largest) {
  int precision = 0;
  while (precision < 22 && 0.5 + largest * (1 << (precision + 1)) < (1 << 15)) ++precision;
  return precision;
}

}  // namespace

void WeightCache::fill(Slot& slot, int in, int out, Interpolation interp) {
  const double scale = static_cast<double>(in) / out;
  const double stretch = std::max(scale, 1.0);
  const double support = (interp == Interpolation::kBilinear ? 1.0 : 2.0) * stretch;
  const double inverse = scale >= 1.0 ? 1.0 / scale : 1.0;
  const int longest = static_cast<int>(std::ceil(support)) * 2 + 1;

  AxisWeights& axis = slot.axis;
  slot.start.resize(out);
  exact_.assign(static_cast<size_t>(out) * longest, 0.0);
  double largest = 0.0;
  axis.window = 1;
  for (int i = 0; i < out; ++i) {
    const double center = scale * (i + 0.5);
    const int first = std::max(static_cast<int>(center - support + 0.5), 0);
    const int end = std::min(static_cast<int>(center + support + 0.5), in);
    const int size = std::clamp(end - first, 0, longest);
    double* row = &exact_[static_cast<size_t>(i) * longest];
    double total = 0.0;
    for (int k = 0; k < size; ++k) {
      row[k] = filter(interp, (k + first - center + 0.5) * inverse);
      total += row[k];
    }
    for (int k = 0; k < size; ++k) {
      if (total != 0.0) row[k] /= total;
      largest = std::max(largest, row[k]);
    }
    slot.start[i] = first;
    axis.window = std::max(axis.window, size);
  }
  // Every window is given the longest one's length, moved inwards where it would leave the input.

  constexpr int kGroup = AxisWeights::kTapGroup;
  axis.taps = (axis.window + kGroup - 1) / kGroup * kGroup;
  axis.precision = weight_precision(largest);
  slot.weight.assign(static_cast<size_t>(out) * axis.taps, 0);
  for (int i = 0; i < out; ++i) {
    const int moved = std::max(slot.start[i] + axis.window - in, 0);
    slot.start[i] -= moved;
    for (int k = 0; k + moved < axis.window; ++k) {
      const double value = exact_[static_cast<size_t>(i) * longest + k] * (1 << axis.precision);
      slot.weight[static_cast<size_t>(i) * axis.taps + k + moved] =
          static_cast<int16_t>(value < 0 ? value - 0.5 : value + 0.5);
    }
  }
  slot.interp = interp;
  axis.in = in;
  axis.out = out;
  axis.start = slot.start.data();
  axis.weight = slot.weight.data();
}

const AxisWeights& WeightCache::get(int in, int out, Interpolation interp) {
  // Neighboring sizes, which random crops have, lie in different slots.
  const int64_t key = int64_t{in} + 31 * int64_t{out} + 17 * static_cast<int>(interp);
  Slot& slot = slots_[key % kSlots];
  if (slot.axis.in != in || slot.axis.out != out || slot.interp != interp) {
    slot.axis.in = 0;  // an exception below must not leave a slot that looks filled
    fill(slot, in, out, interp);
  }
  return slot.axis;
}

}  // namespace bagssl
