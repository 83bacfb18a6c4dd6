// The loops of winograd_ops.h, once per SIMD level: see simd_levels.h.

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
  int64_t image, top, left;  // of the tile's first output
};

inline Place place(const Maps& maps, int64_t tile) {
  const int64_t across = maps.tiles_across(), down = maps.tiles_down();
  return {tile / (across * down), tile / across % down * kTile, tile % across * kTile};
}

/// One tile's transform: `kSize` x `kSize` values from (top, left) on -> points.
template <int kSize, void (*transform)(const Floats*, int, Floats*, int)>
inline void from_maps(const float* x, const Maps& maps, const Part& part, const Layout& layout,
                      int border, float* out) {
  const int64_t padded = (part.last_channel - part.first_channel + kPanel - 1) / kPanel * kPanel;
  Floats values[kSize * kSize], half[kWindow * kSize], points[kPoints];
  for (int64_t tile = part.first; tile < part.last; ++tile) {
    const Place at = place(maps, tile);
    const int64_t top = at.top - border, left = at.left - border;
    const bool inside =
        top >= 0 && left >= 0 && top + kSize <= maps.height && left + kSize <= maps.width;
    const float* corner = x + ((at.image * maps.height + top) * maps.width + left) * maps.channels +
                          part.first_channel;
    float* to_tile = out + (tile - part.first) * layout.tiles;
    for (int64_t c = 0; c < padded; c += kLanes) {
      const int64_t count = part.last_channel - part.first_channel - c;
      for (int i = 0; i < kSize; ++i) {
        const float* row = corner + i * maps.width * maps.channels + c;
        if (inside && count >= kLanes) {
          for (int j = 0; j < kSize; ++j) values[i * kSize + j] = load(row + j * maps.channels);
          continue;
        }
        for (int j = 0; j < kSize; ++j) {
          const bool there =
              top + i >= 0 && top + i < maps.height && left + j >= 0 && left + j < maps.width;
          values[i * kSize + j] = there ? load_some(row + j * maps.channels, count) : Floats{};
        }
      }
      for (int j = 0; j < kSize; ++j) transform(values + j, kSize, half + j, kSize);
      for (int i = 0; i < kWindow; ++i) transform(half + i * kSize, 1, points + i * kWindow, 1);
      float* to = to_tile + c / kPanel * layout.panels + c % kPanel;
      for (int i = 0; i < kPoints; ++i) store(to + i * layout.points, points[i]);
    }
  }
}

void from_windows(const float* x, const Maps& maps, const Part& part, const Layout& layout,
                  float* out) {
  from_maps<kWindow, window_1d>(x, maps, part, layout, 1, out);
}

void from_tiles(const float* dy, const Maps& maps, const Part& part, const Layout& layout,
                float* out) {
  from_maps<kTile, tile_1d>(dy, maps, part, layout, 0, out);
}

void to_tiles(const float* points, const Layout& layout, const Maps& maps, const Part& part,
              float* y) {
  const int64_t channels = part.last_channel - part.first_channel;
  Floats values[kPoints], half[kTile * kWindow], tile_values[kTile * kTile];
  for (int64_t tile = part.first; tile < part.last; ++tile) {
    const Place at = place(maps, tile);
    const int64_t rows = maps.height - at.top < kTile ? maps.height - at.top : kTile;
    const int64_t columns = maps.width - at.left < kTile ? maps.width - at.left : kTile;
    float* corner = y + ((at.image * maps.height + at.top) * maps.width + at.left) * maps.channels +
                    part.first_channel;
    const float* of_tile = points + (tile - part.first) * layout.tiles;
    for (int64_t c = 0; c < channels; c += kLanes) {
      const float* from = of_tile + c / kPanel * layout.panels + c % kPanel;
      for (int i = 0; i < kPoints; ++i) values[i] = load(from + i * layout.points);
      for (int j = 0; j < kWindow; ++j) output_1d(values + j, kWindow, half + j, kWindow);
      for (int i = 0; i < kTile; ++i) output_1d(half + i * kWindow, 1, tile_values + i * kTile, 1);
      for (int64_t i = 0; i < rows; ++i) {
        float* row = corner + i * maps.width * maps.channels + c;
        for (int64_t j = 0; j < columns; ++j) {
          store_some(row + j * maps.channels, tile_values[i * kTile + j], channels - c);
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------ weights

void from_taps(const float* taps, int64_t points, float* out) {
  for (int c = 0; c < kPanel; c += kLanes) {
    Floats values[9], half[3 * kWindow], all[kPoints];
    for (int i = 0; i < 9; ++i) values[i] = load(taps + i * kPanel + c);
    for (int j = 0; j < 3; ++j) taps_1d(values + j, 3, half + j, 3);
    for (int i = 0; i < kWindow; ++i) taps_1d(half + 3 * i, 1, all + i * kWindow, 1);
    for (int i = 0; i < kPoints; ++i) store(out + i * points + c, all[i]);
  }
}

void to_taps(const float* in, int64_t points, float* taps) {
  for (int c = 0; c < kPanel; c += kLanes) {
    Floats values[kPoints], half[3 * kWindow], all[9];
    for (int i = 0; i < kPoints; ++i) values[i] = load(in + i * points + c);
    for (int j = 0; j < kWindow; ++j) taps_gradient_1d(values + j, kWindow, half + j, kWindow);
    for (int i = 0; i < 3; ++i) taps_gradient_1d(half + i * kWindow, 1, all + 3 * i, 1);
    for (int i = 0; i < 9; ++i) store(taps + i * kPanel + c, all[i]);
  }
}

// ------------------------------------------------------------------------------------ product

constexpr int kVectors = kPanel / kLanes;
#ifdef BAGSSL_AVX2
constexpr int kRows = 8 / kVectors;  // 8 sums hide the latency of 5, and 16 registers hold them
#else
constexpr int kRows = 2;
#endif
static_assert(kPanel % kRows == 0, "rows of a step lie in one panel");

// Sums are taken over so many steps, then added to what is there: pieces of a sum lose fewer digits
// than one long chain, and a piece of a panel stays in the nearest cache.
constexpr int64_t kSteps = 128;

template <int kCount>
inline void rows_of_product(const Product& p, const float* a, const float* b, int64_t steps,
                            bool accumulate, float* out) {
  Floats sums[kCount][kVectors] = {};
  const int64_t a_row = p.a_row, a_step = p.a_step;
  for (int64_t s = 0; s < steps; ++s) {
    Floats right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes);
    for (int r = 0; r < kCount; ++r) {
      for (int v = 0; v < kVectors; ++v) sums[r][v] = madd(a[r * a_row], right[v], sums[r][v]);
    }
    a += a_step;
    b += kPanel;
  }
  for (int r = 0; r < kCount; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* to = out + r * p.out_row + v * kLanes;
      store(to, accumulate ? load(to) + sums[r][v] : sums[r][v]);
    }
  }
}

void product(const Product& p) {
  for (int64_t panel = 0; panel < p.panels; ++panel) {
    for (int64_t first = 0; first < p.steps; first += kSteps) {
      const int64_t steps = p.steps - first < kSteps ? p.steps - first : kSteps;
      const bool accumulate = p.accumulate || first > 0;
      const float* b = p.b + panel * p.b_panel + first * kPanel;
      float* out = p.out + panel * kPanel;
      const auto a_at = [&](int64_t r) {
        return p.a + first * p.a_step + r / p.rows_in_panel * p.a_panel +
               r % p.rows_in_panel * p.a_row;
      };
      int64_t row = 0;
      for (; row + kRows <= p.rows; row += kRows) {
        rows_of_product<kRows>(p, a_at(row), b, steps, accumulate, out + row * p.out_row);
      }
      for (; row < p.rows; ++row) {
        rows_of_product<1>(p, a_at(row), b, steps, accumulate, out + row * p.out_row);
      }
    }
  }
}

constexpr WinogradOps kOps = {from_windows, from_tiles, to_tiles, from_taps, to_taps, product};
