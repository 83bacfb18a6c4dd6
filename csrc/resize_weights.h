#pragma once

#include <cstdint>
#include <vector>

#include "patch_views.h"

namespace bagssl {

/// Fixed-point weights of an antialiased resize along one axis, as torchvision (torch's uint8
/// interpolate) has them: out[i] = (sum_k weight[i][k] * in[start[i] + k] + 1/2) >> precision.
/// Weights past the end of a window are zero, so that taps can be taken four at a time.
struct AxisWeights {
  int in = 0, out = 0;
  int taps = 0;    ///< per output, a multiple of kTapGroup
  int window = 0;  ///< the longest window, <= taps; start[i] + window <= in
  int precision = 0;
  const int32_t* start = nullptr;   ///< [out]
  const int16_t* weight = nullptr;  ///< [out, taps]

  static constexpr int kTapGroup = 4;
};

/// Weights by (in, out, interpolation), kept: crops of a fixed scale repeat all the time.
class WeightCache {
 public:
  /// The reference is good until the next call with another key.
  const AxisWeights& get(int in, int out, Interpolation interp);

 private:
  struct Slot {
    Interpolation interp = Interpolation::kBilinear;
    std::vector<int32_t> start;
    std::vector<int16_t> weight;
    AxisWeights axis;
  };
  static constexpr int kSlots = 64;

  void fill(Slot& slot, int in, int out, Interpolation interp);

  std::vector<double> exact_;
  Slot slots_[kSlots];
};

}  // namespace bagssl
