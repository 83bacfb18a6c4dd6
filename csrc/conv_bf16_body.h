// The loops of conv_bf16_ops.h; see simd_levels.h.

#include "bf16_tiles_body.h"

// ------------------------------------------------------------------------------------ packing

constexpr int64_t kBoth = 2 * kLanes;  // numbers that are written together

BAGSSL_INLINE void store_zeros(BFloat16* to) { __builtin_memset(to, 0, 2 * kPanel16); }

/// What will be read or written as this is, one chunk later.
BAGSSL_INLINE void fetch(const BFloat16* at) { __builtin_prefetch(at, 0, 2); }

/// Zeros in the columns up to a whole panel, and in the rows.
BAGSSL_INLINE void pad(BFloat16* m, int64_t rows, int64_t columns) {
  if (columns % kPanel16 != 0) {
    for (int64_t row = 0; row < rows; ++row) store_zeros(m + row * kRowStep16 + columns);
  }
  for (int64_t row = rows; row % kPanel16 != 0; ++row) {
    for (int64_t k = 0; k < columns; k += kPanel16) store_zeros(m + row * kRowStep16 + k);
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

BAGSSL_INLINE void activate(const PixelRows16& p, const Reader& reader, BFloat16* to,
                            int64_t step) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const BFloat16* from = p.x + row * p.step;
    if (reader.scale) {
      activate_run<true>(from, p.channels, p.ahead, reader.scale, reader.shift, to + row * step);
    } else {
      activate_run<false>(from, p.channels, p.ahead, nullptr, nullptr, to + row * step);
    }
  }
}

void write_pixels(const PixelRows16& p, const Reader& reader, BFloat16* to) {
  activate(p, reader, to, p.channels);
}

void pack_pixels(const PixelRows16& p, const Reader& reader, BFloat16* to) {
  activate(p, reader, to, kRowStep16);
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

void pack_windows(const Windows16& w, BFloat16* to) {
  const Run16& last = w.runs[w.count - 1];
  const int64_t reach = last.from + last.count + kPanel16;
  int64_t x = w.first % w.out_width, above = w.first / w.out_width;
  int64_t y = above % w.out_height, image = above / w.out_height;
  for (int64_t row = 0; row < w.rows; ++row) {
    const int64_t pixel = (image * w.height + y * w.stride) * w.width + x * w.stride;
    const BFloat16* corner = w.maps + pixel * w.channels;
    const bool inside = w.end - corner >= reach;
    for (const Run16* run = w.runs; run != w.runs + w.count; ++run) {
      BFloat16* out = to + row * kRowStep16 + run->to;
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

BAGSSL_INLINE void gradients(const GradientRows16& p, BFloat16* to, int64_t step) {
  if (!p.slope) return activate(p.g, {}, to, step);
  for (int64_t row = 0; row < p.g.rows; ++row) {
    const int64_t at = row * p.g.step;
    pack_gradient_run(p.g.x + at, p.y + at, p.g.channels, p.g.ahead, p.slope, p.offset,
                      to + row * step);
  }
}

void write_gradient(const GradientRows16& p, BFloat16* to) { gradients(p, to, p.g.channels); }

void pack_gradient(const GradientRows16& p, BFloat16* to) {
  gradients(p, to, kRowStep16);
  pad(to, p.g.rows, p.g.channels);
}

void transpose(const BFloat16* from, int64_t rows, int64_t columns, BFloat16* to) {
  for (int64_t column = 0; column < columns; column += 8) {
    for (int64_t row = 0; row < rows; row += 32) {
      transpose(from + row * kRowStep16 + column, to + column * kRowStep16 + row);
    }
  }
}

BAGSSL_INLINE int64_t pairs_at(int64_t column) {
  constexpr int64_t kHalf = kMost16 / 2;
  return column / kHalf * kPairStep16 + column % kHalf * 2;
}

void interleave(const BFloat16* from, int64_t rows, int64_t columns, BFloat16* to) {
  for (int64_t row = 0; row < rows; row += 2, from += 2 * kRowStep16, to += kRowStep16) {
    for (int64_t column = 0; column < columns; column += kPanel16) {
      interleave(from + column, from + kRowStep16 + column, to + pairs_at(column));
    }
  }
  // The product reads whole panels of pairs.
  for (int64_t row = (rows + 1) / 2; row % 16 != 0; ++row, to += kRowStep16) {
    for (int64_t column = 0; column < columns; column += kPanel16) {
      store_zeros(to + pairs_at(column));
      store_zeros(to + pairs_at(column) + kPanel16);
    }
  }
}

// ----------------------------------------------------------------------------------- products

/// work(tile, its first column, its first row) with the tiles of a product, when all of its blocks
/// are summed. It works on one tile while the next is computed.
template <typename Work>
BAGSSL_INLINE void for_tiles(const Product16& p, Work work) {
  const Tiles tiles;
  alignas(64) float buffers[2][kPanel16 * kPanel16];
  const float* done = nullptr;
  int64_t done_column = 0, done_row = 0, index = 0;
  const BFloat16* panel = p.weight;
  for (int64_t column = 0; column < p.columns; column += kPanel16, panel += p.of_panel) {
    for (int64_t row = 0; row < p.rows; row += kPanel16, ++index) {
      float* tile = p.tiles ? p.tiles + index * kPanel16 * kPanel16 : buffers[index % 2];
      const int64_t rows = at_most(kPanel16, p.rows - row), pairs = (p.steps + 1) / 2;
      const BFloat16* a = p.a + row * kRowStep16;
      if (p.first) {
        product<false, 2 * kPanel16>(rows, a, panel, pairs, tile, kPanel16);
      } else {
        product<true, 2 * kPanel16>(rows, a, panel, pairs, tile, kPanel16);
      }
      if (!p.last) continue;
      if (done) work(done, done_column, done_row);
      done = tile;
      done_column = column;
      done_row = row;
    }
  }
  if (done) work(done, done_column, done_row);
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

void forward(const Product16& p, const Outputs16& to) {
  for_tiles(p, [&](const float* tile, int64_t column, int64_t row) {
    finish(tile, {to.y + row * to.channels + column, at_most(kPanel16, p.rows - row),
                  at_most(kPanel16, to.channels - column), to.channels, p.rows * to.channels,
                  to.center + column, to.sums ? to.sums + column : nullptr, to.squares + column,
                  to.centered || row > 0});
  });
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

void data(const Product16& p, const MaskChunk16& all) {
  for_tiles(p, [&](const float* tile, int64_t column, int64_t row) {
    MaskChunk16 part = all;
    part.g = tile - column;
    part.g_step = kPanel16;
    part.x += row * all.channels;
    part.dx += row * all.channels;
    part.rows = at_most(kPanel16, p.rows - row);
    mask_some(part, column, at_most(column + kPanel16, all.channels));
  });
}

void data_scattered(const Product16& p, const Scatter16& to) {
  // All taps of some channels before the next channels: they add to the same places.
  const int64_t taps = p.columns / kPanel16 / to.of_tap;
  for (int64_t i = 0; i < p.columns / kPanel16; ++i) {
    const int64_t panel = i % taps * to.of_tap + i / taps;
    Product16 part = p;
    part.weight += panel * p.of_panel;
    part.columns = kPanel16;
    part.first = part.last = true;
    float* maps = to.maps + to.panels[panel];
    for_tiles(part, [&](const float* tile, int64_t, int64_t row) {
      const int64_t rows = at_most(kPanel16, p.rows - row);
      for (int64_t r = 0; r < rows; ++r) {
        float* out = maps + to.rows[row + r];
        BAGSSL_UNROLL
        for (int64_t v = 0; v < kPanel16; v += kLanes) {
          store(out + v, load(out + v) + load(tile + r * kPanel16 + v));
        }
      }
    });
  }
}

void weight(const BFloat16* turned, const BFloat16* pairs, int64_t rows, int64_t steps,
            int64_t channels, float* dweight, int64_t step) {
  const Tiles tiles;
  for (int64_t n = 0; n < channels; n += kPanel16) {
    for (int64_t k = 0; k < steps; k += kPanel16) {
      product<true, kRowStep16>(at_most(kPanel16, channels - n), turned + n * kRowStep16,
                                pairs + pairs_at(k), (rows + 1) / 2, dweight + n * step + k, step);
    }
  }
}

constexpr ConvLoops16 kLoops = {
    kOrder,     pack_pixels, pack_windows, pack_gradient,  write_pixels, write_gradient, transpose,
    interleave, forward,     data,         data_scattered, mask,         weight};
