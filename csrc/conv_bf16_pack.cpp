#include "conv_bf16_pack.h"

#define BAGSSL_BODY "conv_bf16_body.h"
#define BAGSSL_UP_TO_AMX
#include "simd_levels.h"

namespace bagssl {

const ConvLoops16& conv_loops16() { return *BAGSSL_PICK(kLoops); }

void pack_weight16(const float* weight, const KernelStrides& strides, const ConvGeometry& s,
                   BFloat16* out, ThreadPool& pool) {
  const int64_t of_panel = panel_numbers16(s.steps());
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
        const auto copy = [&](int64_t j, int64_t c) {
          const int64_t k = tap * s.channels + c;
          to[k / 2 * 2 * kPanel16 + 2 * j + k % 2] =
              to_bfloat16(from[j * strides.out + c * strides.in]);
        };
        if (strides.out < strides.in) {  // neighbors in memory one after the other
          for (int64_t c = begin; c < end; ++c) {
            for (int64_t j = 0; j < width; ++j) copy(j, c);
          }
        } else {
          for (int64_t j = 0; j < width; ++j) {
            for (int64_t c = begin; c < end; ++c) copy(j, c);
          }
        }
      }
    }
  });
}

void pack_transposed16(const float* weight, const KernelStrides& strides, const ConvGeometry& s,
                       BFloat16* out, ThreadPool& pool) {
  const int64_t of_panel = panel_numbers16(s.out_channels);
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

WindowRows16::WindowRows16(const ConvGeometry& s, const BFloat16* maps, int64_t images,
                           Pieces& pieces)
    : s_(s), maps_(maps), copies_(nullptr), blocks_(s.steps()), runs_(blocks_.count()) {
  if (!maps) {
    copies_ = take16(pieces, copy_floats(s, images));
    numbers_ = images * map_numbers(s) + kPanel16;
    std::fill_n(copies_, numbers_, BFloat16{0});
  }
  // Pixels of a row of the window are neighbors.
  const int64_t length = s.kernel_width * s.channels;
  int64_t k = 0;
  for (int64_t i = 0; i < s.kernel_height; ++i) {
    for (int64_t c = 0, count; c < length; c += count, k += count) {
      count = std::min(length - c, blocks_.length - k % blocks_.length);
      const int64_t from = i * (s.width + 2 * s.padding) * s.channels + c;
      runs_[k / blocks_.length].push_back({from, k % blocks_.length, count});
    }
  }
}

void WindowRows16::pack(int64_t first, int64_t rows, int64_t block, BFloat16* to) const {
  const int64_t before = copies_ ? first_ * s_.out_height * s_.out_width : 0;
  const BFloat16* end = copies_ ? copies_ + numbers_ : maps_ + s_.n * map_numbers(s_);
  const std::vector<Run16>& runs = runs_[block];
  conv_loops16().pack_windows(
      {copies_ ? copies_ : maps_, end, s_.height + 2 * s_.padding, s_.width + 2 * s_.padding,
       s_.channels, s_.stride, s_.out_height, s_.out_width, first - before, rows, runs.data(),
       int64_t(runs.size()), blocks_.length_of(block)},
      to);
}

void Activation16::take(int64_t first, int64_t last) {
  if (!is_copied(s_, x_)) return;
  windows_.begin(first);
  const int64_t row = s_.width * s_.channels, ahead = (last - first) * s_.height * row;
  for (int64_t image = first; image < last; ++image) {
    for (int64_t y = 0; y < s_.height; ++y) {
      conv_loops16().write_pixels(
          {x_.y + (image * s_.height + y) * row, s_.width, s_.channels, s_.channels, ahead},
          reader_, windows_.row(image, y));
    }
  }
}

void Activation16::pack(int64_t first, int64_t rows, int64_t block, BFloat16* to) const {
  if (!s_.pointwise()) return windows_.pack(first, rows, block, to);
  pack_block16(x_, reader_, s_.channels, block, first, rows, to);
}

void pack_block16(const MapsOf<BFloat16>& x, const Reader& reader, int64_t channels, int64_t block,
                  int64_t first, int64_t rows, BFloat16* to) {
  const Blocks16 blocks(channels);
  const int64_t c = blocks.first(block);
  Reader part{};
  if (reader.scale) part = {reader.scale + c, reader.shift + c, reader.center + c};
  conv_loops16().pack_pixels(
      {x.y + first * channels + c, rows, blocks.length_of(block), channels, rows * channels}, part,
      to);
}

}  // namespace bagssl
