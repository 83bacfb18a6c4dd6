// The loops of conv_bf16_ops.h; see simd_levels.h.

#include "bf16_tiles_body.h"

// ------------------------------------------------------------------------------------ packing

constexpr int64_t kBoth = 2 * kLanes;  // numbers that are written together

BAGSSL_INLINE BFloat16* row_of(const Packed16& m, int64_t row, int64_t column) {
  return m.data + column / kBlock16 * m.block + row * kRowStep16 + column % kBlock16;
}

BAGSSL_INLINE void store_zeros(BFloat16* to) { __builtin_memset(to, 0, 2 * kPanel16); }

/// What will be read or written as this is, one chunk later.
BAGSSL_INLINE void fetch(const BFloat16* at) { __builtin_prefetch(at, 0, 2); }

/// Zeros in the columns up to a whole panel, and in the rows.
BAGSSL_INLINE void pad(const Packed16& m, int64_t rows, int64_t columns) {
  if (columns % kPanel16 != 0) {
    BFloat16* last = row_of(m, 0, columns);
    for (int64_t row = 0; row < rows; ++row, last += kRowStep16) store_zeros(last);
  }
  for (int64_t row = rows; row % kPanel16 != 0; ++row) {
    for (int64_t k = 0; k < columns; k += kPanel16) store_zeros(row_of(m, row, k));
  }
}

/// The activation of `count` channels, no number more.
template <bool kDeferred>
BAGSSL_INLINE void activate_run(const BFloat16* from, int64_t count, int64_t ahead,
                                const float* scale, const float* shift, BFloat16* to) {
  const auto activation = [&](Floats x, int64_t i) {
    return kDeferred ? positive(multiply_add(x, load(scale + i), load(shift + i))) : x;
  };
  int64_t i = 0;
  for (; i + kBoth <= count; i += kBoth) {
    fetch(from + i + ahead);
    write_both(to + i, activation(read(from + i), i),
               activation(read(from + i + kLanes), i + kLanes));
  }
  for (; i < count; i += kLanes) {
    write_some(to + i, activation(read_some(from + i, count - i), i), count - i);
  }
}

BAGSSL_INLINE void activate_some(const PixelRows16& p, int64_t row, int64_t first, int64_t count,
                                 const Reader& reader, BFloat16* to) {
  const BFloat16* from = p.x + row * p.channels + first;
  if (reader.scale) {
    activate_run<true>(from, count, p.ahead, reader.scale + first, reader.shift + first, to);
  } else {
    activate_run<false>(from, count, p.ahead, nullptr, nullptr, to);
  }
}

void activate(const PixelRows16& p, const Reader& reader, BFloat16* to) {
  for (int64_t row = 0; row < p.rows; ++row, to += p.channels) {
    activate_some(p, row, 0, p.channels, reader, to);
  }
}

void pack_pixels(const PixelRows16& p, const Reader& reader, const Packed16& to) {
  for (int64_t first = 0; first < p.channels; first += kBlock16) {
    const int64_t count = at_most(kBlock16, p.channels - first);
    for (int64_t row = 0; row < p.rows; ++row) {
      activate_some(p, row, first, count, reader, row_of(to, row, first));
    }
  }
  pad(to, p.rows, p.channels);
}

/// kEnd: no number behind the run is read. Whole panels are written.
template <bool kEnd>
BAGSSL_INLINE void copy_run(const BFloat16* from, int64_t count, BFloat16* to) {
  constexpr unsigned long kSize = sizeof(BFloat16);
  if (kEnd) return void(__builtin_memcpy(to, from, kSize * static_cast<unsigned long>(count)));
  for (int64_t i = 0; i < count; i += kPanel16) {
    __builtin_memcpy(to + i, from + i, kSize * kPanel16);
  }
}

void pack_windows(const Windows16& w, const Packed16& to) {
  const Run16& last = w.runs[w.count - 1];
  const int64_t reach = last.from + last.count + kPanel16;
  int64_t x = w.first % w.out_width, above = w.first / w.out_width;
  int64_t y = above % w.out_height, image = above / w.out_height;
  for (int64_t row = 0; row < w.rows; ++row) {
    const int64_t pixel = (image * w.height + y * w.stride) * w.width + x * w.stride;
    const BFloat16* corner = w.maps + pixel * w.channels;
    const bool inside = w.end - corner >= reach;
    for (const Run16* run = w.runs; run != w.runs + w.count; ++run) {
      BFloat16* out = row_of(to, row, run->to);
      if (inside) {
        copy_run<false>(corner + run->from, run->count, out);
      } else {
        copy_run<true>(corner + run->from, run->count, out);
      }
    }
    if (++x == w.out_width) {
      x = 0;
      if (++y == w.out_height) {
        y = 0;
        ++image;
      }
    }
  }
  pad(to, w.rows, w.columns);
}

BAGSSL_INLINE void pack_gradient_run(const BFloat16* g, const BFloat16* y, int64_t count,
                                     int64_t ahead, const float* slope, const float* offset,
                                     BFloat16* to) {
  int64_t i = 0;
  const auto gradient = [&](Floats of_y, Floats y_here, int64_t c) {
    return of_y + multiply_add(y_here, load(slope + c), load(offset + c));
  };
  for (; i + kBoth <= count; i += kBoth) {
    fetch(g + i + ahead);
    fetch(y + i + ahead);
    write_both(to + i, gradient(read(g + i), read(y + i), i),
               gradient(read(g + i + kLanes), read(y + i + kLanes), i + kLanes));
  }
  for (; i < count; i += kLanes) {
    const int64_t left = count - i;
    write_some(to + i, gradient(read_some(g + i, left), read_some(y + i, left), i), left);
  }
}

void pack_gradient(const GradientRows16& p, const Packed16& to) {
  const int64_t ahead = p.rows * p.channels;
  if (!p.slope) return pack_pixels({p.g, p.rows, p.channels, ahead}, {}, to);
  for (int64_t first = 0; first < p.channels; first += kBlock16) {
    const int64_t count = at_most(kBlock16, p.channels - first);
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t at = row * p.channels + first;
      pack_gradient_run(p.g + at, p.y + at, count, ahead, p.slope + first, p.offset + first,
                        row_of(to, row, first));
    }
  }
  pad(to, p.rows, p.channels);
}

void transpose(const Packed16& from, int64_t rows, int64_t columns, const Packed16& to) {
  for (int64_t column = 0; column < columns; column += 8) {
    for (int64_t row = 0; row < rows; row += 32) {
      transpose(row_of(from, row, column), row_of(to, column, row));
    }
  }
}

void interleave(const Packed16& from, int64_t rows, int64_t columns, const Packed16& to) {
  for (int64_t row = 0; row < rows; row += 2) {
    for (int64_t column = 0; column < columns; column += kPanel16) {
      interleave(row_of(from, row, column), row_of(from, row + 1, column),
                 row_of(to, row / 2, 2 * column));
    }
  }
  // The product reads whole panels of pairs.
  for (int64_t row = (rows + 1) / 2; row % 16 != 0; ++row) {
    for (int64_t column = 0; column < 2 * columns; column += kPanel16) {
      store_zeros(row_of(to, row, column));
    }
  }
}

// ----------------------------------------------------------------------------------- products

BAGSSL_INLINE const BFloat16* panel_of(const BFloat16* weight, int64_t column, int64_t steps) {
  return weight + column * ((steps + kPanel16 - 1) / kPanel16 * kPanel16);
}

/// Where a tile of outputs goes: its first, `step` apart, and what is summed of its columns.
struct Outputs {
  BFloat16* y;
  int64_t rows, width, step, ahead;
  float *center, *sums, *squares;
  bool centered;
};

template <bool kWhole, bool kSums>
BAGSSL_INLINE void finish_columns(const float* tile, const Outputs& o, int64_t c) {
  Floats sum[2], square[2], center[2];
  if (kSums) {
    BAGSSL_UNROLL
    for (int v = 0; v < 2; ++v) {
      const int64_t at = c + v * kLanes;
      sum[v] = load(o.sums + at);
      square[v] = load(o.squares + at);
      center[v] = load(o.centered ? o.center + at : tile + at);
      if (!o.centered) store(o.center + at, center[v]);
    }
  }
  const int64_t left = o.width - c;
  for (int64_t r = 0; r < o.rows; ++r) {
    const Floats y[2] = {load(tile + r * kPanel16 + c), load(tile + r * kPanel16 + c + kLanes)};
    BFloat16* to = o.y + r * o.step + c;
    fetch(to + o.ahead);
    if (kWhole) {
      write_both(to, y[0], y[1]);
    } else {
      write_some(to, y[0], left);
      if (left > kLanes) write_some(to + kLanes, y[1], left - kLanes);
    }
    if (!kSums) continue;
    BAGSSL_UNROLL
    for (int v = 0; v < 2; ++v) {
      const Floats d = y[v] - center[v];
      sum[v] += d;
      square[v] = multiply_add(d, d, square[v]);
    }
  }
  if (!kSums) return;
  BAGSSL_UNROLL
  for (int v = 0; v < 2; ++v) {
    store(o.sums + c + v * kLanes, sum[v]);
    store(o.squares + c + v * kLanes, square[v]);
  }
}

/// Stores a tile and, where that is asked for, sums how far its columns are from their centers.
BAGSSL_INLINE void finish(const float* tile, const Outputs& o) {
  for (int64_t c = 0; c < o.width; c += kBoth) {
    if (o.width - c < kBoth) {
      o.sums ? finish_columns<false, true>(tile, o, c) : finish_columns<false, false>(tile, o, c);
    } else {
      o.sums ? finish_columns<true, true>(tile, o, c) : finish_columns<true, false>(tile, o, c);
    }
  }
}

void forward(const ForwardChunk16& c) {
  const Tiles tiles;
  // One tile is finished while the next is computed.
  alignas(64) float buffers[2][kPanel16 * kPanel16];
  Outputs last{};
  int at = 0;
  for (int64_t first = 0; first < c.channels; first += kPanel16) {
    const BFloat16* panel = panel_of(c.weight, first, c.steps);
    for (int64_t row = 0; row < c.rows; row += kPanel16, at ^= 1) {
      const int64_t rows = at_most(kPanel16, c.rows - row);
      product<false, 2 * kPanel16>(rows, row_of(c.a, row, 0), c.a.block, panel, (c.steps + 1) / 2,
                                   buffers[at], kPanel16);
      finish(buffers[at ^ 1], last);
      last = {c.y + row * c.channels + first,
              rows,
              at_most(kPanel16, c.channels - first),
              c.channels,
              c.rows * c.channels,
              c.center + first,
              c.sums ? c.sums + first : nullptr,
              c.squares + first,
              c.centered || row > 0};
    }
  }
  finish(buffers[at ^ 1], last);
}

// ----------------------------------------------------------------------------------- backward

/// Two vectors of channels of all rows, from channel c on; kWhole: all of them exist.
template <bool kWhole>
BAGSSL_INLINE void mask_channels(const MaskChunk16& m, int64_t c) {
  const Floats zero = {};
  const int64_t left[2] = {m.channels - c, m.channels - c - kLanes};
  const auto put = [&](BFloat16* to, const Floats* dx) {
    if (kWhole) return write_both(to, dx[0], dx[1]);
    write_some(to, dx[0], left[0]);
    if (left[1] > 0) write_some(to + kLanes, dx[1], left[1]);
  };
  if (!m.reader.scale) {
    for (int64_t r = 0; r < m.rows; ++r) {
      const float* g = m.g + r * m.g_step + c;
      const Floats dx[2] = {load(g), load(g + kLanes)};
      put(m.dx + r * m.channels + c, dx);
    }
    return;
  }
  Floats scale[2], shift[2], center[2], dscale[2], dshift[2];
  BAGSSL_UNROLL
  for (int v = 0; v < 2; ++v) {
    const int64_t at = c + v * kLanes;
    scale[v] = kWhole || left[v] > 0 ? load(m.reader.scale + at) : zero;
    shift[v] = kWhole || left[v] > 0 ? load(m.reader.shift + at) : zero;
    center[v] = kWhole || left[v] > 0 ? load(m.reader.center + at) : zero;
    dscale[v] = load(m.dscale + at);
    dshift[v] = load(m.dshift + at);
  }
  for (int64_t r = 0; r < m.rows; ++r) {
    const float* g = m.g + r * m.g_step + c;
    const BFloat16* from = m.x + r * m.channels + c;
    fetch(m.dx + r * m.channels + c + m.ahead);
    Floats dx[2];
    BAGSSL_UNROLL
    for (int v = 0; v < 2; ++v) {
      const Floats x = kWhole ? read(from + v * kLanes) : read_some(from + v * kLanes, left[v]);
      const Floats all = load(g + v * kLanes);
      const Floats masked = multiply_add(x, scale[v], shift[v]) > zero ? all : zero;
      dx[v] = masked * scale[v];
      dshift[v] += masked;
      dscale[v] = multiply_add(masked, x - center[v], dscale[v]);
    }
    put(m.dx + r * m.channels + c, dx);
  }
  BAGSSL_UNROLL
  for (int v = 0; v < 2; ++v) {
    store(m.dscale + c + v * kLanes, dscale[v]);
    store(m.dshift + c + v * kLanes, dshift[v]);
  }
}

BAGSSL_INLINE void mask_some(const MaskChunk16& m, int64_t first, int64_t last) {
  for (int64_t c = first; c < last; c += kBoth) {
    if (c + kBoth <= m.channels) {
      mask_channels<true>(m, c);
    } else {
      mask_channels<false>(m, c);
    }
  }
}

void mask(const MaskChunk16& m) { mask_some(m, 0, m.channels); }

void data(const DataChunk16& c, const MaskChunk16& all) {
  const Tiles tiles;
  // One tile is masked while the next is computed.
  alignas(64) float buffers[2][kPanel16 * kPanel16];
  MaskChunk16 last = all;
  last.g_step = kPanel16;
  int64_t of_last = all.channels;  // no channel of none
  int at = 0;
  const auto finish_last = [&](const float* tile) {
    last.g = tile - of_last;
    mask_some(last, of_last, at_most(of_last + kPanel16, all.channels));
  };
  for (int64_t first = 0; first < all.channels; first += kPanel16) {
    for (int64_t row = 0; row < c.rows; row += kPanel16, at ^= 1) {
      const int64_t rows = at_most(kPanel16, c.rows - row);
      product<false, 2 * kPanel16>(rows, row_of(c.dy, row, 0), c.dy.block,
                                   panel_of(c.weight, first, c.steps), (c.steps + 1) / 2,
                                   buffers[at], kPanel16);
      finish_last(buffers[at ^ 1]);
      last.x = all.x + row * all.channels;
      last.dx = all.dx + row * all.channels;
      last.rows = rows;
      of_last = first;
    }
  }
  finish_last(buffers[at ^ 1]);
}

void data_scattered(const DataChunk16& c, const Scatter16& to) {
  const Tiles tiles;
  // All taps of some channels before the next channels: they add to the same places.
  const int64_t panels = c.columns / kPanel16, taps = panels / to.of_tap;
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t panel = i % taps * to.of_tap + i / taps;
    for (int64_t row = 0; row < c.rows; row += kPanel16) {
      alignas(64) float tile[kPanel16 * kPanel16];
      const int64_t rows = at_most(kPanel16, c.rows - row);
      product<false, 2 * kPanel16>(rows, row_of(c.dy, row, 0), c.dy.block,
                                   panel_of(c.weight, panel * kPanel16, c.steps), (c.steps + 1) / 2,
                                   tile, kPanel16);
      float* maps = to.maps + to.panels[panel];
      for (int64_t r = 0; r < rows; ++r) {
        float* out = maps + to.rows[row + r];
        BAGSSL_UNROLL
        for (int64_t v = 0; v < kPanel16; v += kLanes) {
          store(out + v, load(out + v) + load(tile + r * kPanel16 + v));
        }
      }
    }
  }
}

void weight(const Packed16& dy, const Packed16& a, int64_t rows, int64_t steps, int64_t channels,
            float* dweight, int64_t step) {
  const Tiles tiles;
  for (int64_t n = 0; n < channels; n += kPanel16) {
    for (int64_t k = 0; k < steps; k += kPanel16) {
      product<true, kRowStep16>(at_most(kPanel16, channels - n), row_of(dy, n, 0), dy.block,
                                row_of(a, 0, 2 * k), (rows + 1) / 2, dweight + n * step + k, step);
    }
  }
}

constexpr ConvLoops16 kLoops = {kOrder,        pack_pixels,    activate,   pack_windows,
                                pack_gradient, transpose,      interleave, forward,
                                data,          data_scattered, mask,       weight};
