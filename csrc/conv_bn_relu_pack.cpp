#include "conv_bn_relu_pack.h"

#include <algorithm>

#define BAGSSL_BODY "conv_bn_relu_body.h"
#include "simd_levels.h"

namespace bagssl {
namespace {

thread_local Workspace packed_weights, packed_chunks;

}  // namespace

Workspace& weight_memory() { return packed_weights; }
Workspace& chunk_memory() { return packed_chunks; }

const ConvLoops& conv_loops() { return *BAGSSL_PICK(kLoops); }

int64_t chunk_rows(int64_t columns) {
  const int64_t fit = kChunkFloats / round_up(columns, kBlock) / kMostTileRows * kMostTileRows;
  return std::clamp(fit, 2 * kMostTileRows, kChunkRows);
}

int64_t packed_floats(int64_t rows, int64_t columns) {
  return ceil_div(columns, kBlock) * (rows + kMostTileRows) * kRowStep;
}

ConvGeometry as_pixels(ConvGeometry s) {
  if (s.pointwise()) {
    s.n *= s.height * s.width;
    s.height = s.width = s.out_height = s.out_width = 1;
  }
  return s;
}

std::vector<Run> runs_of(const ConvGeometry& s, bool plain, int64_t block) {
  const bool whole = plain && s.padding == 0;
  const int64_t across = whole ? 1 : s.kernel_width;
  const int64_t length = whole ? s.kernel_width * s.channels : s.channels;
  std::vector<Run> runs;
  int64_t k = 0;
  for (int64_t i = 0; i < s.kernel_height; ++i) {
    for (int64_t j = 0; j < across; ++j) {
      for (int64_t c = 0, count; c < length; c += count, k += count) {
        count = std::min(length - c, kBlock - k % kBlock);
        const int64_t from = (i * s.width + j) * s.channels + c;
        runs.push_back({from, k / kBlock * block + k % kBlock, count, c, i, j});
      }
    }
  }
  return runs;
}

GradientMap::GradientMap(const ConvGeometry& s, const float* mean, const float* dmean,
                         const float* dvar) {
  if (!dmean) return;
  slope_.resize(s.out_channels + kMostLanes);
  offset_.resize(s.out_channels + kMostLanes);
  const double count = static_cast<double>(s.rows());
  for (int64_t c = 0; c < s.out_channels; ++c) {
    const double slope = 2.0 * dvar[c] / count;
    slope_[c] = static_cast<float>(slope);
    offset_[c] = static_cast<float>(dmean[c] / count - slope * mean[c]);
  }
}

void join_sums(const double* sums, int64_t groups, int64_t padded, int64_t channels, float* dscale,
               float* dshift) {
  for (int64_t c = 0; c < channels; ++c) {
    double of_scale = 0, of_shift = 0;
    for (int64_t group = 0; group < groups; ++group) {
      of_scale += sums[group * 2 * padded + c];
      of_shift += sums[(group * 2 + 1) * padded + c];
    }
    dscale[c] = static_cast<float>(of_scale);
    dshift[c] = static_cast<float>(of_shift);
  }
}

void pack_weight(const float* weight, const KernelStrides& strides, const ConvGeometry& s,
                 float* out, ThreadPool& pool) {
  const int64_t panel = conv_loops().panel;
  pool.parallel_for(ceil_div(s.out_channels, panel), [&](int, int64_t item) {
    const int64_t first = item * panel, width = std::min(panel, s.out_channels - first);
    float* to = out + first * s.steps();
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      const float* from = weight + first * strides.out + tap / s.kernel_width * strides.row +
                          tap % s.kernel_width * strides.column;
      for (int64_t c = 0; c < s.channels; ++c, to += panel) {
        for (int64_t j = 0; j < panel; ++j) {
          to[j] = j < width ? from[j * strides.out + c * strides.in] : 0.0f;
        }
      }
    }
  });
}

void pack_transposed(const float* weight, const KernelStrides& strides, const ConvGeometry& s,
                     float* out, ThreadPool& pool) {
  const ConvLoops& loops = conv_loops();
  const int64_t padded = round_up(s.channels, loops.lanes), columns = s.taps() * padded;
  pool.parallel_for(ceil_div(columns, loops.panel), [&](int, int64_t item) {
    float* to = out + item * loops.panel * s.out_channels;
    for (int64_t j = 0; j < loops.panel; ++j) {
      const int64_t tap = (item * loops.panel + j) / padded;
      const int64_t c = (item * loops.panel + j) % padded;
      const bool real = tap < s.taps() && c < s.channels;
      const float* from = weight + c * strides.in + tap / s.kernel_width * strides.row +
                          tap % s.kernel_width * strides.column;
      for (int64_t n = 0; n < s.out_channels; ++n) {
        to[n * loops.panel + j] = real ? from[n * strides.out] : 0.0f;
      }
    }
  });
}

}  // namespace bagssl
