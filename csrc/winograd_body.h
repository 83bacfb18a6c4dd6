// The loops of winograd_ops.h, once per SIMD level: see simd_levels.h.

#include "register_tiles_body.h"

// Sampled at the points 0, +-a, +-b and infinity, with which float32 loses least (bench/NOTES.md).
constexpr float kA = 0.625f, kB = 1.5f;
constexpr float kA2 = kA * kA, kB2 = kB * kB;
// What from_taps divides by: the product of a point's distances to the others.
constexpr float kShare0 = 1 / (kA2 * kB2);
constexpr float kShareA = 1 / (2 * kA2 * (kA2 - kB2)), kShareB = 1 / (2 * kB2 * (kB2 - kA2));

inline Floats madd(float x, Floats y, Floats z) { return multiply_add(splat(x), y, z); }

// ------------------------------------------------------------------- transforms along one side
// Each reads and writes at its own distance, so that it serves rows and columns of small arrays.

inline void window_1d(const Floats* d, int step, Floats* out, int out_step) {
  const Floats d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step],
               d5 = d[5 * step];
  const Floats even_a = madd(-kB2, d2, d4), odd_a = madd(-kB2, d1, d3);
  const Floats even_b = madd(-kA2, d2, d4), odd_b = madd(-kA2, d1, d3);
  out[0] = madd(kA2 * kB2, d0, madd(-(kA2 + kB2), d2, d4));
  out[out_step] = madd(kA, odd_a, even_a);
  out[2 * out_step] = madd(-kA, odd_a, even_a);
  out[3 * out_step] = madd(kB, odd_b, even_b);
  out[4 * out_step] = madd(-kB, odd_b, even_b);
  out[5 * out_step] = madd(kA2 * kB2, d1, madd(-(kA2 + kB2), d3, d5));
}

inline void tile_1d(const Floats* d, int step, Floats* out, int out_step) {
  const Floats d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
  const Floats even_a = madd(kA2, d2, d0), odd_a = madd(kA2, d3, d1);
  const Floats even_b = madd(kB2, d2, d0), odd_b = madd(kB2, d3, d1);
  out[0] = d0;
  out[out_step] = madd(kA, odd_a, even_a);
  out[2 * out_step] = madd(-kA, odd_a, even_a);
  out[3 * out_step] = madd(kB, odd_b, even_b);
  out[4 * out_step] = madd(-kB, odd_b, even_b);
  out[5 * out_step] = d3;
}

inline void output_1d(const Floats* m, int step, Floats* out, int out_step) {
  const Floats m1 = m[step], m2 = m[2 * step], m3 = m[3 * step], m4 = m[4 * step];
  const Floats even_a = m1 + m2, odd_a = m1 - m2, even_b = m3 + m4, odd_b = m3 - m4;
  out[0] = m[0] + even_a + even_b;
  out[out_step] = madd(kB, odd_b, splat(kA) * odd_a);
  out[2 * out_step] = madd(kB2, even_b, splat(kA2) * even_a);
  out[3 * out_step] = madd(kB2 * kB, odd_b, madd(kA2 * kA, odd_a, m[5 * step]));
}

inline void taps_1d(const Floats* w, int step, Floats* out, int out_step) {
  const Floats w0 = w[0], w1 = w[step], w2 = w[2 * step];
  const Floats even_a = splat(kShareA) * madd(kA2, w2, w0), odd_a = splat(kA * kShareA) * w1;
  const Floats even_b = splat(kShareB) * madd(kB2, w2, w0), odd_b = splat(kB * kShareB) * w1;
  out[0] = splat(kShare0) * w0;
  out[out_step] = even_a + odd_a;
  out[2 * out_step] = even_a - odd_a;
  out[3 * out_step] = even_b + odd_b;
  out[4 * out_step] = even_b - odd_b;
  out[5 * out_step] = w2;
}

inline void taps_gradient_1d(const Floats* u, int step, Floats* out, int out_step) {
  const Floats u1 = u[step], u2 = u[2 * step], u3 = u[3 * step], u4 = u[4 * step];
  const Floats even_a = splat(kShareA) * (u1 + u2), odd_a = splat(kShareA) * (u1 - u2);
  const Floats even_b = splat(kShareB) * (u3 + u4), odd_b = splat(kShareB) * (u3 - u4);
  out[0] = madd(kShare0, u[0], even_a + even_b);
  out[out_step] = madd(kB, odd_b, splat(kA) * odd_a);
  out[2 * out_step] = madd(kB2, even_b, madd(kA2, even_a, u[5 * step]));
}

// -------------------------------------------------------------------------------------- tiles

struct Place {
  int64_t image, top, left;  // of the tile's first number
};

inline Place place(const TileRange& tiles, int64_t tile) {
  const int64_t row = tile / tiles.across;
  return {row / tiles.down, row % tiles.down * kTile - tiles.border,
          tile % tiles.across * kTile - tiles.border};
}

/// Each tile's transform: `kSize` x `kSize` values -> points. read_of(channel) gives a function
/// that reads a vector of channels from there on: (offset, number of channels left).
template <int kSize, void (*transform)(const Floats*, int, Floats*, int), typename ReadOf>
inline void from_maps(const WinogradMaps& maps, const TileRange& tiles, const Points& out,
                      ReadOf read_of) {
  Floats values[kSize * kSize], half[kWindow * kSize], points[kPoints];
  for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
    const Place at = place(tiles, tile);
    const bool inside = at.top >= 0 && at.left >= 0 && at.top + kSize <= maps.height &&
                        at.left + kSize <= maps.width;
    const int64_t corner =
        ((at.image * maps.height + at.top) * maps.width + at.left) * maps.channels;
    float* to_tile = out.data + (tile - tiles.first) * kPointRow;
    for (int64_t c = 0; c < tiles.channels; c += kLanes) {
      const int64_t channel = tiles.first_channel + c, left = maps.channels - channel;
      const auto read = read_of(channel);
      for (int i = 0; i < kSize; ++i) {
        const int64_t row = corner + i * maps.width * maps.channels + channel;
        if (inside && left >= kLanes) {
          for (int j = 0; j < kSize; ++j) {
            values[i * kSize + j] = read(row + j * maps.channels, kLanes);
          }
          continue;
        }
        for (int j = 0; j < kSize; ++j) {
          const bool there = at.top + i >= 0 && at.top + i < maps.height && at.left + j >= 0 &&
                             at.left + j < maps.width;
          values[i * kSize + j] = there ? read(row + j * maps.channels, left) : Floats{};
        }
      }
      for (int j = 0; j < kSize; ++j) transform(values + j, kSize, half + j, kSize);
      for (int i = 0; i < kWindow; ++i) transform(half + i * kSize, 1, points + i * kWindow, 1);
      float* to = to_tile + c / kPointBlock * out.block + c % kPointBlock;
      for (int i = 0; i < kPoints; ++i) store(to + i * out.step, points[i]);
    }
  }
}

template <int kSize, void (*transform)(const Floats*, int, Floats*, int)>
inline void from_any_maps(const WinogradMaps& maps, const TileRange& tiles, const Points& out) {
  if (maps.reader.scale) {
    from_maps<kSize, transform>(maps, tiles, out, [&](int64_t c) {
      const Floats scale = load(maps.reader.scale + c), shift = load(maps.reader.shift + c);
      return [=, x = maps.x](int64_t at, int64_t left) {
        return positive(multiply_add(load_some(x + at, left), scale, shift));
      };
    });
  } else if (maps.slope) {
    from_maps<kSize, transform>(maps, tiles, out, [&](int64_t c) {
      const Floats slope = load(maps.slope + c), offset = load(maps.offset + c);
      return [=, x = maps.x, y = maps.y](int64_t at, int64_t left) {
        return load_some(x + at, left) + multiply_add(load_some(y + at, left), slope, offset);
      };
    });
  } else {
    from_maps<kSize, transform>(maps, tiles, out, [&](int64_t) {
      return [x = maps.x](int64_t at, int64_t left) { return load_some(x + at, left); };
    });
  }
}

void from_windows(const WinogradMaps& maps, const TileRange& tiles, const Points& out) {
  from_any_maps<kWindow, window_1d>(maps, tiles, out);
}

void from_tiles(const WinogradMaps& maps, const TileRange& tiles, const Points& out) {
  from_any_maps<kTile, tile_1d>(maps, tiles, out);
}

/// The outputs of one vector of a panel, tile by tile: use(values, rows, columns, offset) of 4x4
/// values, of which the map has some, the first of them `offset` floats behind its start.
template <typename Use>
inline void for_outputs(const TileOutputs& o, int64_t vector, Use use) {
  Floats values[kPoints], half[kTile * kWindow], outputs[kTile * kTile];
  const int64_t channel = o.tiles.first_channel + vector * kLanes;
  for (int64_t tile = o.tiles.first; tile < o.tiles.last; ++tile) {
    const float* from = o.points + (tile - o.tiles.first) * kPanel + vector * kLanes;
    for (int i = 0; i < kPoints; ++i) values[i] = load(from + i * o.step);
    for (int j = 0; j < kWindow; ++j) output_1d(values + j, kWindow, half + j, kWindow);
    for (int i = 0; i < kTile; ++i) output_1d(half + i * kWindow, 1, outputs + i * kTile, 1);
    const Place at = place(o.tiles, tile);
    use(outputs, at_most(kTile, o.height - at.top), at_most(kTile, o.width - at.left),
        ((at.image * o.height + at.top) * o.width + at.left) * o.channels + channel);
  }
}

void to_outputs(const TileOutputs& o, float* mean, float* squares) {
  for (int64_t v = 0; v < kVectors && v * kLanes < o.tiles.channels; ++v) {
    const int64_t left = o.tiles.channels - v * kLanes;
    float seen = 0;
    Floats means = {}, all_squares = {};
    for_outputs(o, v, [&](const Floats* values, int64_t rows, int64_t columns, int64_t at) {
      Floats sum = {}, square = {};
      for (int64_t i = 0; i < rows; ++i) {
        float* row = o.y + at + i * o.width * o.channels;
        for (int64_t j = 0; j < columns; ++j) {
          store_some(row + j * o.channels, values[i * kTile + j], left);
          sum += values[i * kTile + j];
        }
      }
      if (!mean) return;
      // Chan's rule, as in conv_bn_relu_body.h.
      const float count = static_cast<float>(rows * columns), share = count / (seen + count);
      const Floats center = sum * splat(1.0f / count), d = center - means;
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const Floats deviation = values[i * kTile + j] - center;
          square = multiply_add(deviation, deviation, square);
        }
      }
      means = multiply_add(d, splat(share), means);
      all_squares += multiply_add(d * d, splat(seen * share), square);
      seen += count;
    });
    if (!mean) continue;
    store(mean + v * kLanes, means);
    store(squares + v * kLanes, all_squares);
  }
}

void to_gradients(const TileOutputs& o, const float* x, const Reader& reader, float* dscale,
                  float* dshift) {
  for (int64_t v = 0; v < kVectors && v * kLanes < o.tiles.channels; ++v) {
    const int64_t left = o.tiles.channels - v * kLanes;
    const int64_t c = o.tiles.first_channel + v * kLanes, in_row = o.width * o.channels;
    if (!reader.scale) {
      for_outputs(o, v, [&](const Floats* values, int64_t rows, int64_t columns, int64_t at) {
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < columns; ++j) {
            store_some(o.y + at + i * in_row + j * o.channels, values[i * kTile + j], left);
          }
        }
      });
      continue;
    }
    const Floats scale = load(reader.scale + c), shift = load(reader.shift + c);
    const Floats center = load(reader.center + c), zero = {};
    Floats of_scale = {}, of_shift = {};
    for_outputs(o, v, [&](const Floats* values, int64_t rows, int64_t columns, int64_t first) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t at = first + i * in_row + j * o.channels;
          const Floats from = load_some(x + at, left);
          const Floats all = values[i * kTile + j];
          const Floats masked = multiply_add(from, scale, shift) > zero ? all : zero;
          store_some(o.y + at, masked * scale, left);
          of_shift += masked;
          of_scale = multiply_add(masked, from - center, of_scale);
        }
      }
    });
    store(dscale + v * kLanes, load(dscale + v * kLanes) + of_scale);
    store(dshift + v * kLanes, load(dshift + v * kLanes) + of_shift);
  }
}

// ------------------------------------------------------------------------------------ weights

void from_taps(const float* taps, int64_t step, float* out) {
  for (int c = 0; c < kPanel; c += kLanes) {
    Floats values[9], half[3 * kWindow], all[kPoints];
    for (int i = 0; i < 9; ++i) values[i] = load(taps + i * kPanel + c);
    for (int j = 0; j < 3; ++j) taps_1d(values + j, 3, half + j, 3);
    for (int i = 0; i < kWindow; ++i) taps_1d(half + 3 * i, 1, all + i * kWindow, 1);
    for (int i = 0; i < kPoints; ++i) store(out + i * step + c, all[i]);
  }
}

void to_taps(const float* in, int64_t step, int64_t groups, int64_t group, float* taps) {
  for (int c = 0; c < kPanel; c += kLanes) {
    Floats values[kPoints], half[3 * kWindow], all[9];
    for (int i = 0; i < kPoints; ++i) {
      values[i] = load(in + i * step + c);
      for (int64_t g = 1; g < groups; ++g) values[i] += load(in + g * group + i * step + c);
    }
    for (int j = 0; j < kWindow; ++j) taps_gradient_1d(values + j, kWindow, half + j, kWindow);
    for (int i = 0; i < 3; ++i) taps_gradient_1d(half + i * kWindow, 1, all + 3 * i, 1);
    for (int i = 0; i < 9; ++i) store(taps + i * kPanel + c, all[i]);
  }
}

// ----------------------------------------------------------------------------------- products

// Sums are taken over so many steps, then added to what is there: pieces of a sum lose fewer digits
// than one long chain.
constexpr int64_t kSteps = 128;
static_assert(kSteps % kPointBlock == 0, "pieces are whole blocks");

void products(const PointProducts& p) {
  for (int64_t point = 0; point < kPoints; ++point) {
    float* out = p.out + point * p.out_step;
    for (int64_t step = 0; step < p.steps; step += kSteps) {
      const int64_t steps = at_most(kSteps, p.steps - step);
      const float* a = p.a.data + point * p.a.step + step / kPointBlock * p.a.block;
      const float* weight = p.weight + (point * p.steps + step) * kPanel;
      const float* next = weight + steps * kPanel;  // is fetched by the first rows
      for (int64_t row = 0; row < p.rows; row += kTileRows, next += 16 * steps) {
        const bool more = next < weight + 2 * steps * kPanel && next < p.end;
        const Lines lines = {reinterpret_cast<const char*>(more ? next : weight), more ? 64 : 0};
        const int64_t count = at_most(kTileRows, p.rows - row);
        const float* rows = a + row * kPointRow;
        if (step == 0) {
          product_of_rows<false, kPointBlock, kPointRow>(count, rows, p.a.block, weight, steps,
                                                         out + row * kPanel, kPanel, lines);
        } else {
          product_of_rows<true, kPointBlock, kPointRow>(count, rows, p.a.block, weight, steps,
                                                        out + row * kPanel, kPanel, lines);
        }
      }
    }
  }
}

void weight(const Points& a, const Points& dy, int64_t tiles, int64_t columns, int64_t channels,
            float* sums, int64_t sums_step, int64_t sums_rows) {
  // Rows are too far apart for the processor to foresee: each product fetches a column of lines of
  // the next point, first of a, then of dy.
  const int64_t lines_of_a = (columns + 15) / 16, lines_of_dy = (channels + 15) / 16;
  for (int64_t point = 0; point < kPoints; ++point) {
    const float *next_a = a.data + (point + 1) * a.step, *next_dy = dy.data + (point + 1) * dy.step;
    int64_t line = point + 1 < kPoints ? 0 : lines_of_a + lines_of_dy;
    const auto next_lines = [&]() -> Lines {
      const bool of_a = line < lines_of_a;
      if (line >= lines_of_a + lines_of_dy) return {reinterpret_cast<const char*>(sums), 0};
      const int64_t at = 16 * (of_a ? line : line - lines_of_a);
      const float* from = (of_a ? next_a : next_dy) + at % kPointBlock +
                          at / kPointBlock * (of_a ? a.block : dy.block);
      ++line;
      return {reinterpret_cast<const char*>(from), 4 * kPointRow};
    };
    for (int64_t first = 0; first < channels; first += kPanel) {
      const float* panel =
          dy.data + point * dy.step + first / kPointBlock * dy.block + first % kPointBlock;
      float* out = sums + point * sums_step + first * sums_rows;
      for (int64_t block = 0; block < columns; block += kPointBlock) {
        const float* from = a.data + point * a.step + block / kPointBlock * a.block;
        const int64_t count = at_most(kPointBlock, columns - block);
        for (int64_t k = 0; k < count; k += kTileColumns, out += kTileColumns * kPanel) {
          outer_product<kPointRow>(from + k, panel, tiles, out, next_lines());
        }
      }
    }
  }
}

constexpr WinogradLoops kLoops = {kPanel,     kTileColumns, from_windows, from_tiles, products,
                                  to_outputs, to_gradients, from_taps,    to_taps,    weight};
