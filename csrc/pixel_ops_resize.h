// The resize loops of pixel_ops.h; part of pixel_ops_body.h.

namespace bagssl {
namespace {

inline uint8_t clamp_byte(int32_t x) { return static_cast<uint8_t>(x < 0 ? 0 : x > 255 ? 255 : x); }

void copy_row(const uint8_t* row, int width, bool flip, uint8_t* out) {
  for (int i = 0; i < width; ++i) {
    uint8_t* pixel = out + 4 * (flip ? width - 1 - i : i);
    for (int c = 0; c < 3; ++c) pixel[c] = row[3 * i + c];
    pixel[3] = 0;
  }
}

#ifdef BAGSSL_V3

/// Sums of one output pixel, int32 (r, g, b, 0): two taps of a channel meet in one multiply-add.
template <bool kTwoTaps>
inline __m128i weigh_pixel(const uint8_t* in, const int16_t* w, int taps, __m128i sum) {
  const __m128i pair0 = _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
  const __m128i pair1 = _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
  const auto weights = [w](int k) {
    int32_t both;
    __builtin_memcpy(&both, w + k, sizeof(both));
    return _mm_set1_epi32(both);
  };
  if (kTwoTaps) {
    const __m128i two = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in));
    return _mm_add_epi32(sum, _mm_madd_epi16(_mm_shuffle_epi8(two, pair0), weights(0)));
  }
  for (int k = 0; k < taps; k += AxisWeights::kTapGroup) {
    const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 3 * k));
    sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_shuffle_epi8(four, pair0), weights(k)));
    sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_shuffle_epi8(four, pair1), weights(k + 2)));
  }
  return sum;
}

template <bool kTwoTaps>
void resize_row_taps(const uint8_t* row, const AxisWeights& weights, bool flip, uint8_t* out) {
  const __m128i half = _mm_set1_epi32(1 << (weights.precision - 1));
  const __m128i shift = _mm_cvtsi32_si128(weights.precision);
  const int32_t* start = weights.start;
  const int16_t* w = weights.weight;
  const int taps = weights.taps, width = weights.out;
  int i = 0;
  for (; i + 4 <= width; i += 4, w += 4 * taps) {
    __m128i sum[4];
    for (int j = 0; j < 4; ++j) {
      sum[j] = _mm_sra_epi32(
          weigh_pixel<kTwoTaps>(row + 3 * start[i + j], w + j * taps, taps, half), shift);
    }
    __m128i pixels =
        _mm_packus_epi16(_mm_packs_epi32(sum[0], sum[1]), _mm_packs_epi32(sum[2], sum[3]));
    if (flip) pixels = _mm_shuffle_epi32(pixels, _MM_SHUFFLE(0, 1, 2, 3));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4 * (flip ? width - 4 - i : i)), pixels);
  }
  for (; i < width; ++i, w += taps) {
    __m128i sum = weigh_pixel<kTwoTaps>(row + 3 * start[i], w, taps, half);
    sum = _mm_packs_epi32(_mm_sra_epi32(sum, shift), sum);
    const int32_t pixel = _mm_cvtsi128_si32(_mm_packus_epi16(sum, sum));
    __builtin_memcpy(out + 4 * (flip ? width - 1 - i : i), &pixel, sizeof(pixel));
  }
}

void resize_row(const uint8_t* row, const AxisWeights& weights, bool flip, uint8_t* out) {
  if (weights.window <= 2) {
    resize_row_taps<true>(row, weights, flip, out);
  } else {
    resize_row_taps<false>(row, weights, flip, out);
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

void resize_row(const uint8_t* row, const AxisWeights& weights, bool flip, uint8_t* out) {
  const int32_t half = 1 << (weights.precision - 1);
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

}  // namespace
}  // namespace bagssl
