// The loops of conv_bn_relu_ops.h; see simd_levels.h.

#include "register_tiles_body.h"

// ------------------------------------------------------------------------------------ packing

/// `count` floats, of which whole vectors are written and, unless kEnd, read.
template <bool kDeferred, bool kEnd>
BAGSSL_INLINE void pack_run(const float* from, const float* end, int64_t count, const float* scale,
                            const float* shift, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats x = kEnd ? load_some(from + i, end - from - i) : load(from + i);
    if (kDeferred) x = positive(multiply_add(x, load(scale + i), load(shift + i)));
    store(to + i, x);
  }
}

/// A window whose first pixel is (y, x) of a map and at `corner`, where a map has it.
template <bool kDeferred, bool kEnd>
BAGSSL_INLINE void pack_window(const PixelRows& pixels, const ConvGeometry& s, const Reader& reader,
                               const float* corner, int64_t y, int64_t x, float* to) {
  const bool inside =
      y >= 0 && x >= 0 && y + s.kernel_height <= s.height && x + s.kernel_width <= s.width;
  for (const Run* run = pixels.runs; run != pixels.runs + pixels.count; ++run) {
    const int64_t down = y + run->down, across = x + run->across;
    if (inside || (down >= 0 && down < s.height && across >= 0 && across < s.width)) {
      const float* scale = kDeferred ? reader.scale + run->channel : nullptr;
      const float* shift = kDeferred ? reader.shift + run->channel : nullptr;
      pack_run<kDeferred, kEnd>(corner + run->from, pixels.end, run->count, scale, shift,
                                to + run->to);
    } else {
      for (int64_t i = 0; i < run->count; i += kLanes) store(to + run->to + i, Floats{});
    }
  }
}

template <bool kDeferred>
BAGSSL_INLINE void pack_windows(const PixelRows& pixels, const ConvGeometry& s,
                                const Reader& reader, const Packed& to) {
  const Run& last = pixels.runs[pixels.count - 1];
  const int64_t reach = last.from + last.count + kLanes;
  int64_t ox = pixels.first % s.out_width, above = pixels.first / s.out_width;
  int64_t oy = above % s.out_height, image = above / s.out_height;
  for (int64_t row = 0; row < pixels.rows; ++row) {
    const int64_t y = oy * s.stride - s.padding, x = ox * s.stride - s.padding;
    const float* corner = pixels.x + ((image * s.height + y) * s.width + x) * s.channels;
    float* out = to.data + row * kRowStep;
    if (pixels.end - corner >= reach) {
      pack_window<kDeferred, false>(pixels, s, reader, corner, y, x, out);
    } else {
      pack_window<kDeferred, true>(pixels, s, reader, corner, y, x, out);
    }
    if (++ox == s.out_width) {
      ox = 0;
      if (++oy == s.out_height) {
        oy = 0;
        ++image;
      }
    }
  }
}

void pack_pixels(const PixelRows& pixels, const ConvGeometry& geometry, const Reader& reader,
                 const Packed& to) {
  if (reader.scale) return pack_windows<true>(pixels, geometry, reader, to);
  pack_windows<false>(pixels, geometry, {}, to);
}

/// One row's columns of one block; kEnd: the last row, behind which nothing is read.
template <bool kEnd>
BAGSSL_INLINE void pack_gradient_run(const GradientRows& rows, int64_t row, int64_t first,
                                     int64_t count, float* to) {
  const int64_t at = row * rows.channels + first;
  const auto read = [&](const float* from, int64_t i) {
    return kEnd ? load_some(from + at + i, rows.left - at - i) : load(from + at + i);
  };
  if (!rows.slope) {
    for (int64_t i = 0; i < count; i += kLanes) store(to + i, read(rows.g, i));
    return;
  }
  const float *slope = rows.slope + first, *offset = rows.offset + first;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats mean_part = multiply_add(read(rows.y, i), load(slope + i), load(offset + i));
    store(to + i, read(rows.g, i) + mean_part);
  }
}

void pack_gradient(const GradientRows& rows, const Packed& to) {
  for (int64_t first = 0; first < rows.channels; first += kBlock) {
    const int64_t count = at_most(kBlock, rows.channels - first);
    float* out = to.data + first / kBlock * to.block;
    for (int64_t row = 0; row < rows.rows; ++row, out += kRowStep) {
      if ((row + 1) * rows.channels + kLanes <= rows.left) {
        pack_gradient_run<false>(rows, row, first, count, out);
      } else {
        pack_gradient_run<true>(rows, row, first, count, out);
      }
    }
  }
}

// ----------------------------------------------------------------------------------- products

/// Joins the rows of a tile to the mean and centered squares of the `seen` rows before them, by
/// Chan's rule (Chan, Golub, LeVeque 1979).
BAGSSL_INLINE void add_moments(const float* y, int64_t step, int64_t rows, int64_t seen,
                               float* mean, float* squares) {
  Floats sum[kVectors] = {}, square[kVectors] = {}, center[kVectors];
  for (int64_t r = 0; r < rows; ++r) {
    BAGSSL_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[v] += load(y + r * step + v * kLanes);
  }
  const float count = static_cast<float>(rows), before = static_cast<float>(seen);
  BAGSSL_UNROLL
  for (int v = 0; v < kVectors; ++v) center[v] = sum[v] * splat(1.0f / count);
  for (int64_t r = 0; r < rows; ++r) {
    BAGSSL_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Floats d = load(y + r * step + v * kLanes) - center[v];
      square[v] = multiply_add(d, d, square[v]);
    }
  }
  const float share = count / (before + count);
  BAGSSL_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const Floats old = load(mean + v * kLanes), d = center[v] - old;
    store(mean + v * kLanes, multiply_add(d, splat(share), old));
    const Floats between = multiply_add(d * d, splat(before * share), square[v]);
    store(squares + v * kLanes, load(squares + v * kLanes) + between);
  }
}

void forward(const ForwardChunk& c) {
  for (int64_t first = 0; first < c.channels; first += kPanel) {
    const float* panel = c.weight + first * c.steps;
    const int64_t width = at_most(kPanel, c.channels - first);
    for (int64_t row = 0; row < c.rows; row += kTileRows) {
      alignas(64) float tile[kTileRows * kPanel];
      const int64_t rows = at_most(kTileRows, c.rows - row);
      const bool full = rows == kTileRows && width == kPanel;
      float* y = c.y + row * c.channels + first;
      float* out = full ? y : tile;
      const int64_t step = full ? c.channels : kPanel;
      product_of_rows(rows, c.a.data + row * kRowStep, c.a.block, panel, c.steps, out, step,
                      take(c.ahead, c.steps, panel));
      for (int64_t r = 0; !full && r < rows; ++r) {
        for (int64_t j = 0; j < width; j += kLanes) {
          store_some(y + r * c.channels + j, load(tile + r * kPanel + j), width - j);
        }
      }
      if (c.mean) add_moments(out, step, rows, row, c.mean + first, c.squares + first);
    }
  }
}

// ----------------------------------------------------------------------------------- backward

/// One vector of channels of all rows, from channel c on; kWhole: all of them exist.
template <bool kWhole>
BAGSSL_INLINE void mask_channels(const MaskChunk& m, int64_t c) {
  const int64_t left = kWhole ? kLanes : m.channels - c;
  const float *g = m.g + c, *from = m.x + c;
  float* to = m.dx + c;
  if (!m.reader.scale) {
    for (int64_t r = 0; r < m.rows; ++r) store_some(to + r * m.step, load(g + r * m.g_step), left);
    return;
  }
  const Floats scale = load(m.reader.scale + c), shift = load(m.reader.shift + c);
  const Floats center = load(m.reader.center + c), zero = {};
  Floats dscale = load(m.dscale + c), dshift = load(m.dshift + c);
  for (int64_t r = 0; r < m.rows; ++r) {
    const Floats x = load_some(from + r * m.step, left);
    const Floats all = load(g + r * m.g_step);
    const Floats masked = multiply_add(x, scale, shift) > zero ? all : zero;
    store_some(to + r * m.step, masked * scale, left);
    dshift += masked;
    dscale = multiply_add(masked, x - center, dscale);
  }
  store(m.dscale + c, dscale);
  store(m.dshift + c, dshift);
}

void mask(const MaskChunk& m) {
  int64_t c = 0;
  for (; c + kLanes <= m.channels; c += kLanes) mask_channels<true>(m, c);
  if (c < m.channels) mask_channels<false>(m, c);
}

void data_pointwise(const DataChunk& c, const MaskChunk& all) {
  for (int64_t first = 0; first < c.columns; first += kPanel) {
    for (int64_t row = 0; row < c.rows; row += kTileRows) {
      alignas(64) float tile[kTileRows * kPanel];
      const int64_t rows = at_most(kTileRows, c.rows - row);
      product_of_rows(rows, c.dy.data + row * kRowStep, c.dy.block, c.weight + first * c.steps,
                      c.steps, tile, kPanel, take(c.ahead, c.steps, c.weight));
      MaskChunk part = all;
      part.g = tile;
      part.g_step = kPanel;
      part.x += row * all.step + first;
      part.dx += row * all.step + first;
      part.rows = rows;
      part.channels = at_most(kPanel, all.channels - first);
      if (all.reader.scale) {
        part.reader = {all.reader.scale + first, all.reader.shift + first,
                       all.reader.center + first};
        part.dscale += first;
        part.dshift += first;
      }
      mask(part);
    }
  }
}

void data_scattered(const DataChunk& c, const Scatter& to) {
  // All taps of some channels before the next channels: they add to the same places. Where panels
  // hold channels of two taps, in the order of memory.
  const int64_t panels = (c.columns + kPanel - 1) / kPanel;
  const int64_t of_tap = to.tap_columns % kPanel == 0 ? to.tap_columns / kPanel : panels;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t taps = panels / of_tap, first = (panel % taps * of_tap + panel / taps) * kPanel;
    const int64_t vectors = at_most(kPanel, c.columns - first) / kLanes;
    for (int64_t row = 0; row < c.rows; row += kTileRows) {
      alignas(64) float tile[kTileRows * kPanel];
      const int64_t rows = at_most(kTileRows, c.rows - row);
      product_of_rows(rows, c.dy.data + row * kRowStep, c.dy.block, c.weight + first * c.steps,
                      c.steps, tile, kPanel, take(c.ahead, c.steps, c.weight));
      for (int64_t v = 0; v < vectors; ++v) {
        float* map = to.map + to.columns[first / kLanes + v];
        for (int64_t r = 0; r < rows; ++r) {
          float* out = map + to.rows[row + r];
          store(out, load(out) + load(tile + r * kPanel + v * kLanes));
        }
      }
    }
  }
}

void weight(const Packed& a, const Packed& dy, int64_t rows, int64_t steps, int64_t channels,
            float* dweight, Ahead* ahead) {
  for (int64_t first = 0; first < channels; first += kPanel) {
    const float* panel = dy.data + first / kBlock * dy.block + first % kBlock;
    for (int64_t block = 0; block < steps; block += kBlock) {
      const float* columns = a.data + block / kBlock * a.block;
      const int64_t count = at_most(kBlock, steps - block);
      for (int64_t k = 0; k < count; k += kTileColumns, dweight += kTileColumns * kPanel) {
        outer_product(columns + k, panel, rows, dweight, take(ahead, rows, panel));
      }
    }
  }
}

constexpr ConvLoops kLoops = {kLanes,  kPanel,         kTileColumns,   pack_pixels, pack_gradient,
                              forward, data_pointwise, data_scattered, mask,        weight};
