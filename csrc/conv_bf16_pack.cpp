#include "conv_bf16_pack.h"

#define BAGSSL_BODY "conv_bf16_body.h"
#define BAGSSL_UP_TO_AMX
#include "simd_levels.h"

namespace bagssl {

const ConvLoops16& conv_loops16() { return *BAGSSL_PICK(kLoops); }

int64_t chunk_rows16(int64_t columns) {
  const int64_t fit = kChunkNumbers16 / columns / kPanel16 * kPanel16;
  return std::clamp(fit, kPanel16, kChunkRows16);
}

int64_t packed_floats16(int64_t rows, int64_t columns) {
  return ceil_div(columns, kBlock16) * (round_up(rows, kPanel16) + kPanel16) * kRowStep16 / 2;
}

Packed16 packed16(Pieces& pieces, int64_t rows, int64_t columns) {
  BFloat16* data = take16(pieces, 2 * packed_floats16(rows, columns));
  return {data, (round_up(rows, kPanel16) + kPanel16) * kRowStep16};
}

void pack_weight16(const float* weight, const KernelStrides& strides, const ConvGeometry& s,
                   BFloat16* out, ThreadPool& pool) {
  const int64_t of_panel = round_up(s.steps(), kPanel16) * kPanel16;
  pool.parallel_for(ceil_div(s.out_channels, kPanel16), [&](int, int64_t item) {
    const int64_t first = item * kPanel16, width = std::min(kPanel16, s.out_channels - first);
    BFloat16* to = out + item * of_panel;
    std::fill_n(to, of_panel, BFloat16{0});
    constexpr int64_t kTogether = 64;  // channels: what is written stays in the cache
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      const float* from = weight + first * strides.out + tap / s.kernel_width * strides.row +
                          tap % s.kernel_width * strides.column;
      for (int64_t begin = 0; begin < s.channels; begin += kTogether) {
        const int64_t end = std::min(s.channels, begin + kTogether);
        for (int64_t j = 0; j < width; ++j) {
          for (int64_t c = begin; c < end; ++c) {
            const int64_t k = tap * s.channels + c;
            to[k / 2 * 2 * kPanel16 + 2 * j + k % 2] =
                to_bfloat16(from[j * strides.out + c * strides.in]);
          }
        }
      }
    }
  });
}

void pack_transposed16(const float* weight, const KernelStrides& strides, const ConvGeometry& s,
                       BFloat16* out, ThreadPool& pool) {
  const int64_t of_panel = round_up(s.out_channels, kPanel16) * kPanel16;
  const int64_t of_tap = ceil_div(s.channels, kPanel16);
  pool.parallel_for(s.taps() * of_tap, [&](int, int64_t item) {
    const int64_t tap = item / of_tap, first = item % of_tap * kPanel16;
    const int64_t width = std::min(kPanel16, s.channels - first);
    const float* from = weight + first * strides.in + tap / s.kernel_width * strides.row +
                        tap % s.kernel_width * strides.column;
    BFloat16* to = out + item * of_panel;
    std::fill_n(to, of_panel, BFloat16{0});
    for (int64_t n = 0; n < s.out_channels; ++n) {
      BFloat16* pairs = to + n / 2 * 2 * kPanel16 + n % 2;
      for (int64_t c = 0; c < width; ++c) {
        pairs[2 * c] = to_bfloat16(from[n * strides.out + c * strides.in]);
      }
    }
  });
}

Activation16::Activation16(const ConvGeometry& s, const MapsOf<BFloat16>& x, const Reader& reader,
                           int64_t images, Pieces& pieces)
    : s_(s), x_(x), reader_(reader), maps_(nullptr) {
  if (s.pointwise()) return;
  if (is_copied(s, x)) {
    // Numbers behind the last are read and mean nothing.
    maps_ = take16(pieces, images * map_numbers(s) + kPanel16);
    std::fill_n(maps_, images * map_numbers(s), BFloat16{0});
  }
  // Pixels of a row of the window are neighbors.
  const int64_t length = s.kernel_width * s.channels;
  int64_t k = 0;
  for (int64_t i = 0; i < s.kernel_height; ++i) {
    for (int64_t c = 0, count; c < length; c += count, k += count) {
      count = std::min(length - c, kBlock16 - k % kBlock16);
      runs_.push_back({i * (s.width + 2 * s.padding) * s.channels + c, k, count});
    }
  }
}

void Activation16::take(int64_t first, int64_t last) {
  first_ = first;
  if (!maps_) return;
  const int64_t width = s_.width + 2 * s_.padding;
  const int64_t ahead = (last - first) * s_.height * s_.width * s_.channels;
  for (int64_t image = first; image < last; ++image) {
    BFloat16* map = maps_ + (image - first) * map_numbers(s_);
    const BFloat16* from = x_.y + image * s_.height * s_.width * s_.channels;
    for (int64_t y = 0; y < s_.height; ++y) {
      const int64_t inside = (y + s_.padding) * width + s_.padding;
      conv_loops16().activate({from + y * s_.width * s_.channels, s_.width, s_.channels, ahead},
                              reader_, map + inside * s_.channels);
    }
  }
}

void Activation16::pack(int64_t first, int64_t rows, const Packed16& to) const {
  if (s_.pointwise()) {
    conv_loops16().pack_pixels({x_.y + first * s_.channels, rows, s_.channels, rows * s_.channels},
                               reader_, to);
    return;
  }
  const int64_t before = maps_ ? first_ * s_.out_height * s_.out_width : 0;
  const BFloat16* x_end = x_.y + s_.n * s_.height * s_.width * s_.channels;
  conv_loops16().pack_windows(
      {maps_ ? maps_ : x_.y, maps_ ? nullptr : x_end, s_.height + 2 * s_.padding,
       s_.width + 2 * s_.padding, s_.channels, s_.stride, s_.out_height, s_.out_width,
       first - before, rows, runs_.data(), int64_t(runs_.size()), s_.steps()},
      to);
}

}  // namespace bagssl
