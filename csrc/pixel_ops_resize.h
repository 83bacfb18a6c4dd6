// The resize loops of pixel_ops.h; part of pixel_ops_body.h.

inline uint8_t clamp_byte(int32_t x) { return static_cast<uint8_t>(x < 0 ? 0 : x > 255 ? 255 : x); }

void copy_row(const uint8_t* row, int width, bool flip, uint8_t* out) {
  for (int i = 0; i < width; ++i) {
    uint8_t* pixel = out + 4 * (flip ? width - 1 - i : i);
    for (int c = 0; c < 3; ++c) pixel[c] = row[3 * i + c];
    pixel[3] = 0;
  }
}

#ifdef BAGSSL_AVX2

// A register holds the same pixels of two rows, one row per 128-bit lane.

inline __m256i load_two(const uint8_t* row0, const uint8_t* row1) {
  const __m128i lane0 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row0));
  const __m128i lane1 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row1));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(lane0), lane1, 1);
}

inline __m256i two_weights(const int16_t* w) {
  int32_t both;
  __builtin_memcpy(&both, w, sizeof(both));
  return _mm256_set1_epi32(both);
}

/// `sum` plus an output pixel's taps, int32 (r, g, b, 0) per row: two taps of a channel meet in one
/// multiply-add, four taps in one load; kOdd: the last load has two.
template <bool kOdd>
inline __m256i weigh_pixel(const uint8_t* row0, const uint8_t* row1, const int16_t* w, int fours,
                           __m256i sum) {
  const __m256i first_two = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
  const __m256i last_two = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
  for (int k = 0; k < fours; ++k, row0 += 12, row1 += 12, w += 4) {
    const __m256i taps = load_two(row0, row1);
    sum = _mm256_add_epi32(sum,
                           _mm256_madd_epi16(_mm256_shuffle_epi8(taps, first_two), two_weights(w)));
    sum = _mm256_add_epi32(
        sum, _mm256_madd_epi16(_mm256_shuffle_epi8(taps, last_two), two_weights(w + 2)));
  }
  if (!kOdd) return sum;
  const __m256i taps = _mm256_shuffle_epi8(load_two(row0, row1), first_two);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(taps, two_weights(w)));
}

template <bool kOdd>
void resize_rows_taps(const uint8_t* row0, const uint8_t* row1, const AxisWeights& weights,
                      bool flip, uint8_t* out0, uint8_t* out1) {
  const __m256i half = _mm256_set1_epi32(1 << (weights.precision - 1));
  const __m128i shift = _mm_cvtsi32_si128(weights.precision);
  const int32_t* start = weights.start;
  const int16_t* w = weights.weight;
  const int taps = weights.taps, width = weights.out;
  const int fours = kOdd ? taps / 4 - 1 : taps / 4;
  int i = 0;
  for (; i + 4 <= width; i += 4, w += 4 * taps) {
    __m256i sum[4];
    for (int j = 0; j < 4; ++j) {
      const int at = 3 * start[i + j];
      sum[j] = _mm256_sra_epi32(weigh_pixel<kOdd>(row0 + at, row1 + at, w + j * taps, fours, half),
                                shift);
    }
    __m256i pixels =
        _mm256_packus_epi16(_mm256_packs_epi32(sum[0], sum[1]), _mm256_packs_epi32(sum[2], sum[3]));
    if (flip) pixels = _mm256_shuffle_epi32(pixels, _MM_SHUFFLE(0, 1, 2, 3));
    const int at = 4 * (flip ? width - 4 - i : i);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out0 + at), _mm256_castsi256_si128(pixels));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out1 + at), _mm256_extracti128_si256(pixels, 1));
  }
  for (; i < width; ++i, w += taps) {
    const int from = 3 * start[i], to = 4 * (flip ? width - 1 - i : i);
    __m256i sum = weigh_pixel<kOdd>(row0 + from, row1 + from, w, fours, half);
    sum = _mm256_packs_epi32(_mm256_sra_epi32(sum, shift), sum);
    sum = _mm256_packus_epi16(sum, sum);
    const int32_t pixel0 = _mm256_extract_epi32(sum, 0), pixel1 = _mm256_extract_epi32(sum, 4);
    __builtin_memcpy(out0 + to, &pixel0, sizeof(pixel0));
    __builtin_memcpy(out1 + to, &pixel1, sizeof(pixel1));
  }
}

void resize_rows(const uint8_t* row0, const uint8_t* row1, const AxisWeights& weights, bool flip,
                 uint8_t* out0, uint8_t* out1) {
  if (weights.taps - weights.window >= 2) {
    resize_rows_taps<true>(row0, row1, weights, flip, out0, out1);
  } else {
    resize_rows_taps<false>(row0, row1, weights, flip, out0, out1);
  }
}

/// Eight RGBX pixels -> eight floats of each plane.
inline void unpack_pixels(__m256i pixels, float* r, float* g, float* b) {
  const __m256i byte = _mm256_set1_epi32(255);
  _mm256_storeu_ps(r, _mm256_cvtepi32_ps(_mm256_and_si256(pixels, byte)));
  _mm256_storeu_ps(g, _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(pixels, 8), byte)));
  _mm256_storeu_ps(b, _mm256_cvtepi32_ps(_mm256_srli_epi32(pixels, 16)));
}

void unpack_row(const uint8_t* rgbx, int width, float* r, float* g, float* b) {
  for (int x = 0; x < width; x += 8) {
    const __m256i pixels = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rgbx + 4 * x));
    unpack_pixels(pixels, r + x, g + x, b + x);
  }
}

void resize_column(const uint8_t* rows, int stride, const AxisWeights& weights, int i, int width,
                   float* r, float* g, float* b) {
  const __m256i half = _mm256_set1_epi32(1 << (weights.precision - 1));
  const __m256i zero = _mm256_setzero_si256();
  const __m128i shift = _mm_cvtsi32_si128(weights.precision);
  const int16_t* w = weights.weight + static_cast<int64_t>(i) * weights.taps;
  const uint8_t* first = rows + static_cast<int64_t>(weights.start[i]) * stride;
  for (int x = 0; x < width; x += 8) {
    __m256i sum0 = half, sum1 = half, sum2 = half, sum3 = half;
    const uint8_t* in = first + 4 * x;
    for (int k = 0; k < weights.window; k += 2, in += 2 * static_cast<int64_t>(stride)) {
      int32_t both;
      __builtin_memcpy(&both, w + k, sizeof(both));
      const __m256i weight = _mm256_set1_epi32(both);
      const __m256i upper = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
      const __m256i lower = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + stride));
      const __m256i low = _mm256_unpacklo_epi8(upper, lower);
      const __m256i high = _mm256_unpackhi_epi8(upper, lower);
      sum0 = _mm256_add_epi32(sum0, _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weight));
      sum1 = _mm256_add_epi32(sum1, _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weight));
      sum2 = _mm256_add_epi32(sum2, _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weight));
      sum3 = _mm256_add_epi32(sum3, _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weight));
    }
    const __m256i low =
        _mm256_packs_epi32(_mm256_sra_epi32(sum0, shift), _mm256_sra_epi32(sum1, shift));
    const __m256i high =
        _mm256_packs_epi32(_mm256_sra_epi32(sum2, shift), _mm256_sra_epi32(sum3, shift));
    unpack_pixels(_mm256_packus_epi16(low, high), r + x, g + x, b + x);
  }
}

#else

void resize_rows(const uint8_t* row0, const uint8_t* row1, const AxisWeights& weights, bool flip,
                 uint8_t* out0, uint8_t* out1) {
  const int32_t half = 1 << (weights.precision - 1);
  for (int second = 0; second < 2; ++second) {
    const uint8_t* row = second ? row1 : row0;
    uint8_t* out = second ? out1 : out0;
    for (int i = 0; i < weights.out; ++i) {
      const int16_t* w = weights.weight + static_cast<int64_t>(i) * weights.taps;
      const uint8_t* in = row + 3 * static_cast<int64_t>(weights.start[i]);
      int32_t sum[3] = {half, half, half};
      for (int k = 0; k < weights.window; ++k) {
        for (int c = 0; c < 3; ++c) sum[c] += w[k] * in[3 * k + c];
      }
      uint8_t* pixel = out + 4 * (flip ? weights.out - 1 - i : i);
      for (int c = 0; c < 3; ++c) pixel[c] = clamp_byte(sum[c] >> weights.precision);
      pixel[3] = 0;
    }
  }
}

void unpack_row(const uint8_t* rgbx, int width, float* r, float* g, float* b) {
  for (int x = 0; x < width; ++x) {
    r[x] = rgbx[4 * x];
    g[x] = rgbx[4 * x + 1];
    b[x] = rgbx[4 * x + 2];
  }
}

void resize_column(const uint8_t* rows, int stride, const AxisWeights& weights, int i, int width,
                   float* r, float* g, float* b) {
  const int32_t half = 1 << (weights.precision - 1);
  const int16_t* w = weights.weight + static_cast<int64_t>(i) * weights.taps;
  const uint8_t* first = rows + static_cast<int64_t>(weights.start[i]) * stride;
  // A few values at a time, so that the inner loop runs along the row and stays in registers.
  constexpr int kBlock = 16;
  for (int x = 0; x < width; x += kBlock / 4) {
    int32_t sum[kBlock];
    for (int j = 0; j < kBlock; ++j) sum[j] = half;
    for (int k = 0; k < weights.window; ++k) {
      const uint8_t* in = first + static_cast<int64_t>(k) * stride + 4 * x;
      for (int j = 0; j < kBlock; ++j) sum[j] += w[k] * in[j];
    }
    for (int j = 0; j < kBlock / 4; ++j) {
      r[x + j] = clamp_byte(sum[4 * j] >> weights.precision);
      g[x + j] = clamp_byte(sum[4 * j + 1] >> weights.precision);
      b[x + j] = clamp_byte(sum[4 * j + 2] >> weights.precision);
    }
  }
}

#endif
