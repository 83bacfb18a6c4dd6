// The loops of patch_grid.h over one tile: kWidth columns of the result, a cache line. Once per
// SIMD level: see simd_levels.h.
//
// Two images at a time, so that a weight is read once for both. For each frequency across: the
// products of spectra, folded into sums and differences of frequencies v and -v, then the transform
// along the height by two real matrices, cosines for the sums and sines for the differences, at
// distances from the center: positions at either side share them. Then the same along the width.

constexpr int kVectors = 64 / kVectorBytes;                   // in a line
constexpr int kMostRows = kVectors == 1 ? 6 : 12 / kVectors;  // sums in registers

/// A line of memory in registers.
template <typename T>
struct Line {
  Vector<T> v[kVectors];
};

template <typename T>
BAGSSL_INLINE Line<T> load_line(const T* from) {
  // Vector by vector: a copy of the whole would keep it in memory.
  Line<T> line;
  for (int j = 0; j < kVectors; ++j) line.v[j] = load(from + j * (kWidth<T> / kVectors));
  return line;
}

template <typename T>
BAGSSL_INLINE void store_line(T* to, const Line<T>& line) {
  for (int j = 0; j < kVectors; ++j) store(to + j * (kWidth<T> / kVectors), line.v[j]);
}

/// The first `count` values of a line; the others are zero, or left alone.
template <typename T>
BAGSSL_INLINE Line<T> load_part(const T* from, int64_t count) {
  if (count == kWidth<T>) return load_line(from);
  T values[kWidth<T>] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = from[i];
  return load_line(values);
}

template <typename T>
BAGSSL_INLINE void store_part(T* to, const Line<T>& line, int64_t count) {
  if (count == kWidth<T>) return store_line(to, line);
  T values[kWidth<T>];
  store_line(values, line);
  for (int64_t i = 0; i < count; ++i) to[i] = values[i];
}

template <typename T>
BAGSSL_INLINE void add(Line<T>& sum, T x, const Line<T>& y) {
  for (int j = 0; j < kVectors; ++j) sum.v[j] = multiply_add(splat(x), y.v[j], sum.v[j]);
}

template <typename T>
BAGSSL_INLINE void subtract(Line<T>& sum, T x, const Line<T>& y) {
  for (int j = 0; j < kVectors; ++j) sum.v[j] = multiply_subtract(splat(x), y.v[j], sum.v[j]);
}

template <typename T>
BAGSSL_INLINE void clear(T* lines, int64_t count) {
  for (int64_t i = 0; i < count * kWidth<T>; ++i) lines[i] = 0;
}

// ------------------------------------------------------------------------ small matrix products

template <typename T>
struct Matrix {
  const T* data;
  int64_t row, column;  // strides
};

template <int kRows, typename T>
BAGSSL_INLINE void multiply_rows(Matrix<T> matrix, int64_t depth, const T* in, T* out) {
  Line<T> sums[kRows] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Line<T> x = load_line(in + k * kWidth<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      add(sums[r], matrix.data[r * matrix.row + k * matrix.column], x);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) store_line(out + r * kWidth<T>, sums[r]);
}

/// out = matrix [rows, depth] times in [depth lines].
template <typename T>
__attribute__((noinline)) void multiply(Matrix<T> matrix, int64_t rows, int64_t depth, const T* in,
                                        T* out) {
  for (int64_t parts = (rows + kMostRows - 1) / kMostRows; parts > 0; --parts) {
    const int64_t size = (rows + parts - 1) / parts;
    switch (size) {
      case 1:
        multiply_rows<1>(matrix, depth, in, out);
        break;
      case 2:
        multiply_rows<2>(matrix, depth, in, out);
        break;
      case 3:
        multiply_rows<3>(matrix, depth, in, out);
        break;
      case 4:
        multiply_rows < kMostRows<4 ? 1 : 4>(matrix, depth, in, out);
        break;
      case 5:
        multiply_rows < kMostRows<5 ? 1 : 5>(matrix, depth, in, out);
        break;
      default:
        multiply_rows<kMostRows>(matrix, depth, in, out);
    }
    matrix.data += size * matrix.row;
    out += size * kWidth<T>;
    rows -= size;
  }
}

// -------------------------------------------------------------------------------------- forward

/// sums[image][part] = the product of spectra at one frequency; moves on to the next.
template <int kImages, typename T>
BAGSSL_INLINE void next_product(const T* (&pixels)[kImages], const T*& weight, int64_t channels,
                                Line<T> (&sums)[kImages][2]) {
#pragma GCC unroll 8
  for (int i = 0; i < kImages; ++i) sums[i][0] = sums[i][1] = Line<T>{};
  for (int64_t c = 0; c < channels; ++c) {
    const Line<T> real = load_line(weight + c * kWidth<T>);
    const Line<T> imaginary = load_line(weight + (channels + c) * kWidth<T>);
#pragma GCC unroll 8
    for (int i = 0; i < kImages; ++i) {
      const T x = pixels[i][c], y = pixels[i][channels + c];
      add(sums[i][0], x, real);
      add(sums[i][1], x, imaginary);
      subtract(sums[i][0], y, imaginary);
      add(sums[i][1], y, real);
    }
  }
  weight += 2 * channels * kWidth<T>;
  for (auto& image : pixels) image += 2 * channels;
}

template <int kImages, typename T>
BAGSSL_INLINE void products_folded(const PatchGrid<T>& grid, const TileScratch<T>& s, int64_t b,
                                   int64_t f) {
  constexpr int64_t kLine = kWidth<T>;
  const int64_t half = grid.down.half, values = 2 * grid.channels, block = (2 * half + 1) * values;
  const T* weight = s.weight + f * block * kLine;
  const T* pixels[kImages];
  for (int i = 0; i < kImages; ++i) {
    pixels[i] = grid.pixels + ((b + i) * (grid.across.half + 1) + f) * block;
  }
  Line<T> sums[kImages][2];
  next_product(pixels, weight, grid.channels, sums);
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kImages; ++i) {
    store_line(s.even + i * (half + 1) * kLine, sums[i / 2][i % 2]);
  }
  for (int64_t u = 1; u <= half; ++u) {
    next_product(pixels, weight, grid.channels, sums);
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kImages; ++i) {
      store_line(s.even + (i * (half + 1) + u) * kLine, sums[i / 2][i % 2]);
    }
    next_product(pixels, weight, grid.channels, sums);
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kImages; ++i) {
      T* even = s.even + (i * (half + 1) + u) * kLine;
      Line<T> sum = load_line(even), difference;
      for (int j = 0; j < kVectors; ++j) {
        const Vector<T> negative = sums[i / 2][i % 2].v[j];
        difference.v[j] = sum.v[j] - negative;
        sum.v[j] += negative;
      }
      store_line(even, sum);
      store_line(s.odd + (i * half + u - 1) * kLine, difference);
    }
  }
}

/// Frequency f of all rows of patches of one image.
template <typename T>
BAGSSL_INLINE void back_along_height(const PatchGrid<T>& grid, const TileScratch<T>& s, int image,
                                     int64_t f) {
  constexpr int64_t kLine = kWidth<T>;
  const PatchAxis<T>& axis = grid.down;
  const int64_t half = axis.half, part = axis.distances * kLine;
  for (int p = 0; p < 2; ++p) {
    const int64_t i = 2 * image + p;
    multiply<T>({axis.cosines, half + 1, 1}, axis.distances, half + 1,
                s.even + i * (half + 1) * kLine, s.cosine_sums + p * part);
    multiply<T>({axis.sines, half, 1}, axis.distances, half, s.odd + i * half * kLine,
                s.sine_sums + p * part);
  }
  const int64_t frequencies = grid.across.half + 1;
  for (int64_t t = 0; t < axis.count; ++t) {
    const int64_t at = axis.distance[t] * kLine;
    Line<T> real = load_line(s.cosine_sums + at), imaginary = load_line(s.cosine_sums + part + at);
    subtract(real, axis.sign[t], load_line(s.sine_sums + part + at));
    add(imaginary, axis.sign[t], load_line(s.sine_sums + at));
    T* out = s.rows + ((image * axis.count + t) * 2 * frequencies + f) * kLine;
    store_line(out, real);
    store_line(out + frequencies * kLine, imaginary);
  }
}

template <typename T>
BAGSSL_INLINE void back_along_width(const PatchGrid<T>& grid, const TileScratch<T>& s, int64_t row,
                                    const int64_t* slots, const Line<T>& bias, bool relu, T* y,
                                    int64_t columns) {
  constexpr int64_t kLine = kWidth<T>;
  const PatchAxis<T>& axis = grid.across;
  const int64_t frequencies = axis.half + 1;
  const T* in = s.rows + row * 2 * frequencies * kLine;
  multiply<T>({axis.cosines, frequencies, 1}, axis.distances, frequencies, in, s.cosine_sums);
  multiply<T>({axis.sines, axis.half, 1}, axis.distances, axis.half, in + (frequencies + 1) * kLine,
              s.sine_sums);
  for (int64_t l = 0; l < axis.count; ++l) {
    if (slots[l] < 0) continue;
    const int64_t at = axis.distance[l] * kLine;
    Line<T> out = load_line(s.cosine_sums + at);
    add(out, axis.sign[l], load_line(s.sine_sums + at));
    for (int j = 0; j < kVectors; ++j) {
      out.v[j] += bias.v[j];
      if (relu) out.v[j] = out.v[j] < 0 ? Vector<T>{} : out.v[j];  // a NaN stays
    }
    store_part(y + slots[l] * grid.patch_stride, out, columns);
  }
}

template <int kImages, typename T>
BAGSSL_INLINE void forward_images(const PatchGrid<T>& grid, const TileScratch<T>& s, int64_t b,
                                  const Line<T>& bias, bool relu, T* y, int64_t columns) {
  for (int64_t f = 0; f <= grid.across.half; ++f) {
    products_folded<kImages>(grid, s, b, f);
    for (int i = 0; i < kImages; ++i) back_along_height(grid, s, i, f);
  }
  for (int i = 0; i < kImages; ++i) {
    for (int64_t t = 0; t < grid.down.count; ++t) {
      back_along_width(grid, s, i * grid.down.count + t, grid.slots + t * grid.across.count, bias,
                       relu, y + (b + i) * grid.image_stride, columns);
    }
  }
}

/// `weight`, `bias` and `y` begin at the tile's first column.
template <typename T>
void forward_tile(const PatchGrid<T>& grid, const T* weight, const T* bias, bool relu, T* y,
                  int64_t columns, const TileScratch<T>& s) {
  for (int64_t i = 0; i < s.weight_lines; ++i) {
    store_line(s.weight + i * kWidth<T>, load_part(weight + i * grid.out_dim, columns));
  }
  const Line<T> shift = bias == nullptr ? Line<T>{} : load_part(bias, columns);
  int64_t b = 0;
  for (; b + 2 <= grid.batch; b += 2) forward_images<2>(grid, s, b, shift, relu, y, columns);
  if (b < grid.batch) forward_images<1>(grid, s, b, shift, relu, y, columns);
}

// ------------------------------------------------------------------------------------- backward

/// The spectra across of one row of patches, from its gradient; gives the gradient's sum.
template <typename T>
BAGSSL_INLINE Line<T> along_width(const PatchGrid<T>& grid, const TileScratch<T>& s, int64_t row,
                                  const int64_t* slots, const T* dy, const T* y, int64_t columns) {
  constexpr int64_t kLine = kWidth<T>;
  const PatchAxis<T>& axis = grid.across;
  clear(s.cosine_sums, axis.distances);
  clear(s.sine_sums, axis.distances);
  Line<T> total = {};
  for (int64_t l = 0; l < axis.count; ++l) {
    if (slots[l] < 0) continue;
    const int64_t from = slots[l] * grid.patch_stride;
    Line<T> gradient = load_part(dy + from, columns);
    if (y != nullptr) {
      const Line<T> result = load_part(y + from, columns);
      for (int j = 0; j < kVectors; ++j) {
        gradient.v[j] = result.v[j] > 0 ? gradient.v[j] : Vector<T>{};
      }
    }
    T* even = s.cosine_sums + axis.distance[l] * kLine;
    T* odd = s.sine_sums + axis.distance[l] * kLine;
    Line<T> sum = load_line(even), difference = load_line(odd);
    for (int j = 0; j < kVectors; ++j) {
      sum.v[j] += gradient.v[j];
      total.v[j] += gradient.v[j];
    }
    add(difference, axis.sign[l], gradient);
    store_line(even, sum);
    store_line(odd, difference);
  }
  const int64_t frequencies = axis.half + 1;
  T* out = s.rows + row * 2 * frequencies * kLine;
  multiply<T>({axis.cosines, 1, frequencies}, frequencies, axis.distances, s.cosine_sums, out);
  clear(out + frequencies * kLine, 1);
  multiply<T>({axis.sines, 1, axis.half}, axis.half, axis.distances, s.sine_sums,
              out + (frequencies + 1) * kLine);
  return total;
}

/// The gradient of products_folded's sums and differences of one image.
template <typename T>
BAGSSL_INLINE void along_height(const PatchGrid<T>& grid, const TileScratch<T>& s, int image,
                                int64_t f) {
  constexpr int64_t kLine = kWidth<T>;
  const PatchAxis<T>& axis = grid.down;
  const int64_t half = axis.half, part = axis.distances * kLine;
  const int64_t frequencies = grid.across.half + 1;
  clear(s.cosine_sums, 2 * axis.distances);
  clear(s.sine_sums, 2 * axis.distances);
  for (int64_t t = 0; t < axis.count; ++t) {
    const T* in = s.rows + ((image * axis.count + t) * 2 * frequencies + f) * kLine;
    const Line<T> real = load_line(in), imaginary = load_line(in + frequencies * kLine);
    T* cosine_sums = s.cosine_sums + axis.distance[t] * kLine;
    T* sine_sums = s.sine_sums + axis.distance[t] * kLine;
    Line<T> sums[4] = {load_line(cosine_sums), load_line(cosine_sums + part), load_line(sine_sums),
                       load_line(sine_sums + part)};
    for (int j = 0; j < kVectors; ++j) {
      sums[0].v[j] += real.v[j];
      sums[1].v[j] += imaginary.v[j];
    }
    add(sums[2], axis.sign[t], imaginary);
    subtract(sums[3], axis.sign[t], real);
    store_line(cosine_sums, sums[0]);
    store_line(cosine_sums + part, sums[1]);
    store_line(sine_sums, sums[2]);
    store_line(sine_sums + part, sums[3]);
  }
  for (int p = 0; p < 2; ++p) {
    const int64_t i = 2 * image + p;
    multiply<T>({axis.cosines, 1, half + 1}, half + 1, axis.distances, s.cosine_sums + p * part,
                s.even + i * (half + 1) * kLine);
    multiply<T>({axis.sines, 1, half}, half, axis.distances, s.sine_sums + p * part,
                s.odd + i * half * kLine);
  }
}

/// Adds to the gradient of the weight's spectrum at one frequency.
template <int kImages, typename T>
BAGSSL_INLINE void add_product(const T* const (&pixels)[kImages],
                               const Line<T> (&gradient)[kImages][2], int64_t channels,
                               T* dweight) {
  for (int64_t c = 0; c < channels; ++c) {
    T* real_out = dweight + c * kWidth<T>;
    T* imaginary_out = dweight + (channels + c) * kWidth<T>;
    Line<T> real = load_line(real_out), imaginary = load_line(imaginary_out);
#pragma GCC unroll 8
    for (int i = 0; i < kImages; ++i) {
      const T x = pixels[i][c], y = pixels[i][channels + c];
      add(real, x, gradient[i][0]);
      add(imaginary, x, gradient[i][1]);
      add(real, y, gradient[i][1]);
      subtract(imaginary, y, gradient[i][0]);
    }
    store_line(real_out, real);
    store_line(imaginary_out, imaginary);
  }
}

template <int kImages, typename T>
BAGSSL_INLINE void add_products(const PatchGrid<T>& grid, const TileScratch<T>& s, int64_t b,
                                int64_t f) {
  constexpr int64_t kLine = kWidth<T>;
  const int64_t half = grid.down.half, values = 2 * grid.channels, block = (2 * half + 1) * values;
  T* dweight = s.weight + f * block * kLine;
  const T* pixels[kImages];
  for (int i = 0; i < kImages; ++i) {
    pixels[i] = grid.pixels + ((b + i) * (grid.across.half + 1) + f) * block;
  }
  Line<T> gradient[kImages][2];
  for (int64_t v = 0; v <= 2 * half; ++v) {
    const int64_t u = (v + 1) / 2;
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kImages; ++i) {
      Line<T>& sum = gradient[i / 2][i % 2];
      sum = load_line(s.even + (i * (half + 1) + u) * kLine);
      if (u == 0) continue;
      const Line<T> difference = load_line(s.odd + (i * half + u - 1) * kLine);
      const bool negative = v % 2 == 0;
      for (int j = 0; j < kVectors; ++j) {
        sum.v[j] = negative ? sum.v[j] - difference.v[j] : sum.v[j] + difference.v[j];
      }
    }
    add_product(pixels, gradient, grid.channels, dweight);
    dweight += values * kLine;
    for (auto& image : pixels) image += values;
  }
}

template <int kImages, typename T>
BAGSSL_INLINE void backward_images(const PatchGrid<T>& grid, const TileScratch<T>& s, int64_t b,
                                   const T* dy, const T* y, int64_t columns, Line<T>& dbias) {
  Line<T> total = {};
  for (int i = 0; i < kImages; ++i) {
    for (int64_t t = 0; t < grid.down.count; ++t) {
      const int64_t at = (b + i) * grid.image_stride;
      const Line<T> sum =
          along_width(grid, s, i * grid.down.count + t, grid.slots + t * grid.across.count, dy + at,
                      y == nullptr ? nullptr : y + at, columns);
      for (int j = 0; j < kVectors; ++j) total.v[j] += sum.v[j];
    }
  }
  for (int j = 0; j < kVectors; ++j) dbias.v[j] += total.v[j];
  for (int64_t f = 0; f <= grid.across.half; ++f) {
    for (int i = 0; i < kImages; ++i) along_height(grid, s, i, f);
    add_products<kImages>(grid, s, b, f);
  }
}

/// All pointers begin at the tile's first column.
template <typename T>
void backward_tile(const PatchGrid<T>& grid, const T* dy, const T* y, T* dweight, T* dbias,
                   int64_t columns, const TileScratch<T>& s) {
  clear(s.weight, s.weight_lines);
  Line<T> total = load_part(dbias, columns);
  int64_t b = 0;
  for (; b + 2 <= grid.batch; b += 2) backward_images<2>(grid, s, b, dy, y, columns, total);
  if (b < grid.batch) backward_images<1>(grid, s, b, dy, y, columns, total);
  store_part(dbias, total, columns);
  for (int64_t i = 0; i < s.weight_lines; ++i) {
    T* out = dweight + i * grid.out_dim;
    Line<T> sum = load_part(out, columns);
    const Line<T> own = load_line(s.weight + i * kWidth<T>);
    for (int j = 0; j < kVectors; ++j) sum.v[j] += own.v[j];
    store_part(out, sum, columns);
  }
}
