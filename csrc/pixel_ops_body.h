// The loops of pixel_ops.h, once per SIMD level: see simd_levels.h.

#include "pixel_ops_resize.h"

// ------------------------------------------------------------------------ vectors of floats

static_assert(kPlanePadding % kLanes == 0 && kWidthPadding % kLanes == 0, "no ragged tails");

inline Floats larger(Floats x, Floats y) { return x > y ? x : y; }

inline Floats smaller(Floats x, Floats y) { return x < y ? x : y; }

/// Toward zero, |x| < 2^31.
inline Floats truncate(Floats x) {
#ifdef BAGSSL_AVX2
  return _mm256_round_ps(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#else
  return __builtin_convertvector(__builtin_convertvector(x, Ints), Floats);
#endif
}

/// Down, |x| < 2^31.
inline Floats floor(Floats x) {
#ifdef BAGSSL_AVX2
  return _mm256_round_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  const Floats whole = truncate(x);
  return whole > x ? whole - 1.0f : whole;
#endif
}

/// To uint8 and back, as torch casts a clamped float.
inline Floats to_byte(Floats x) { return truncate(smaller(larger(x, splat(0.0f)), splat(255.0f))); }

/// rgb_to_grayscale before it is cast, floored: torch's chain of fused multiply-adds.
inline Floats gray(Floats r, Floats g, Floats b) {
  return truncate(fused(b, splat(0.114f), fused(g, splat(0.587f), r * 0.2989f)));
}

// ----------------------------------------------------------------------------------- color

void brightness(Planes planes, float factor) {
  for (float* plane : planes.channel) {
    for (int i = 0; i < planes.size; i += kLanes) {
      store(plane + i, truncate(smaller(load(plane + i) * factor, splat(255.0f))));
    }
  }
}

void contrast(Planes planes, float factor, int pixels) {
  const float *r = planes.channel[0], *g = planes.channel[1], *b = planes.channel[2];
  Ints sums = {};  // 255 * 2^23 fits a lane, which sees a quarter of the pixels at most
  for (int i = 0; i < planes.size; i += kLanes) {
    sums += __builtin_convertvector(gray(load(r + i), load(g + i), load(b + i)), Ints);
  }
  int64_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  const Floats mean = splat(static_cast<float>(sum) / static_cast<float>(pixels));
  const Floats rest = splat(1.0f - factor);
  for (float* plane : planes.channel) {
    for (int i = 0; i < planes.size; i += kLanes) {
      store(plane + i, to_byte(fused(mean, rest, load(plane + i) * factor)));
    }
  }
}

void saturation(Planes planes, float factor) {
  const Floats rest = splat(1.0f - factor);
  for (int i = 0; i < planes.size; i += kLanes) {
    float *r = planes.channel[0] + i, *g = planes.channel[1] + i, *b = planes.channel[2] + i;
    const Floats red = load(r), green = load(g), blue = load(b);
    const Floats luma = gray(red, green, blue);
    store(r, to_byte(fused(luma, rest, red * factor)));
    store(g, to_byte(fused(luma, rest, green * factor)));
    store(b, to_byte(fused(luma, rest, blue * factor)));
  }
}

/// torch's _rgb_to_hsv, shift, _hsv_to_rgb and cast, with the same roundings and less work: of a
/// pixel's two differences from the maximum one is the range itself, so one quotient is 1; and of
/// the four values that _hsv_to_rgb chooses from, v and p are the largest and the smallest channel
/// exactly, and only one of q and t occurs.
void hue(Planes planes, float shift) {
  constexpr float kByte = static_cast<float>(1.0 / 255.0), kSixth = static_cast<float>(1.0 / 6.0);
  constexpr float kToByte = static_cast<float>(255.0 + 1.0 - 1e-3);
  const Floats no_zero = splat(1e-3f);  // below any range or maximum but 0, where h is all one
  const Floats zero = splat(0.0f), one = splat(1.0f), two = splat(2.0f), four = splat(4.0f);
  for (int i = 0; i < planes.size; i += kLanes) {
    float *red = planes.channel[0] + i, *green = planes.channel[1] + i,
          *blue = planes.channel[2] + i;
    const Floats r = load(red), g = load(green), b = load(blue);
    const Floats high = larger(larger(r, g), b), low = smaller(smaller(r, g), b);
    const Floats v = high * kByte, range = v - low * kByte;
    const Floats quotient = (v - (r + g + b - high - low) * kByte) / larger(range, no_zero);
    const Floats s = range / larger(v, no_zero);

    // Torch: bc - gc where the maximum is r, else 2 + rc - bc where it is g, else 4 + gc - rc.
    const Ints is_r = high == r, is_g = high == g;
    const Floats base = is_r ? zero : is_g ? two : four;
    const Floats added = is_r ? b : is_g ? r : g;
    const Floats h0 = added == low ? (base + 1.0f) - quotient : (quotient + base) - 1.0f;
    const Floats h1 = h0 * kSixth + 1.0f;
    const Floats h2 = (h1 - truncate(h1)) + shift;
    const Floats h = (h2 - floor(h2)) * 6.0f;

    const Floats sector = truncate(h);  // 6, after a rounding, comes out like 0
    const Ints odd = __builtin_convertvector(sector, Ints) << 31;
    const Floats sf = s * (h - sector);
    const Floats x = odd < 0 ? one - sf : sf + (one - s);
    const Floats middle = truncate(x * v * kToByte);
    const Ints from1 = h >= 1.0f, from2 = h >= 2.0f, from3 = h >= 3.0f, from4 = h >= 4.0f,
               from5 = h >= 5.0f, from6 = h >= 6.0f;
    const Floats r0 = from1 ? middle : high, r2 = from2 ? low : r0, r4 = from4 ? middle : r2;
    const Floats g0 = from1 ? high : middle, g3 = from3 ? middle : g0;
    const Floats b2 = from2 ? middle : low, b3 = from3 ? high : b2, b5 = from5 ? middle : b3;
    store(red, from5 ? high : r4);
    store(green, from4 ? low : g3);
    store(blue, from6 ? low : b5);
  }
}

void grayscale(Planes planes) {
  float *r = planes.channel[0], *g = planes.channel[1], *b = planes.channel[2];
  for (int i = 0; i < planes.size; i += kLanes) {
    const Floats luma = gray(load(r + i), load(g + i), load(b + i));
    store(r + i, luma);
    store(g + i, luma);
    store(b + i, luma);
  }
}

void solarize(Planes planes, float threshold) {
  for (float* plane : planes.channel) {
    for (int i = 0; i < planes.size; i += kLanes) {
      const Floats x = load(plane + i);
      store(plane + i, x >= threshold ? 255.0f - x : x);
    }
  }
}

// ------------------------------------------------------------------------------------- blur

void blur_column(const float* const* rows, const float* weights, int kernel, int width,
                 float* out) {
  for (int x = 0; x < width; x += kLanes) {
    Floats sum = load(rows[0] + x) * weights[0];
    for (int k = 1; k < kernel; ++k) sum += load(rows[k] + x) * weights[k];
    store(out + x, sum);
  }
}

void blur_row(const float* padded, const float* weights, int kernel, int width, float* out) {
  // Adding and taking away 1.5 * 2^23 leaves the nearest integer, halves to even.
  constexpr float kMagic = 12582912.0f;
  for (int x = 0; x < width; x += kLanes) {
    Floats sum = load(padded + x) * weights[0];
    for (int k = 1; k < kernel; ++k) sum += load(padded + x + k) * weights[k];
    store(out + x, (sum + kMagic) - kMagic);
  }
}

// ----------------------------------------------------------------------------------- output

void store_uint8(Planes planes, int pixels, uint8_t* out) {
  const float *r = planes.channel[0], *g = planes.channel[1], *b = planes.channel[2];
  for (int i = 0; i < pixels; ++i) {
    out[3 * i] = static_cast<uint8_t>(static_cast<int32_t>(r[i]));
    out[3 * i + 1] = static_cast<uint8_t>(static_cast<int32_t>(g[i]));
    out[3 * i + 2] = static_cast<uint8_t>(static_cast<int32_t>(b[i]));
  }
}

void store_float(Planes planes, int pixels, const float* scale, const float* offset, float* out) {
  const float *r = planes.channel[0], *g = planes.channel[1], *b = planes.channel[2];
  const float scale_r = scale[0], scale_g = scale[1], scale_b = scale[2];
  const float offset_r = offset[0], offset_g = offset[1], offset_b = offset[2];
  for (int i = 0; i < pixels; ++i) {
    out[3 * i] = r[i] * scale_r + offset_r;
    out[3 * i + 1] = g[i] * scale_g + offset_g;
    out[3 * i + 2] = b[i] * scale_b + offset_b;
  }
}

void store_table(Planes planes, int pixels, const uint16_t (*table)[256], uint16_t* out) {
  const float *r = planes.channel[0], *g = planes.channel[1], *b = planes.channel[2];
  for (int i = 0; i < pixels; ++i) {
    out[3 * i] = table[0][static_cast<int32_t>(r[i])];
    out[3 * i + 1] = table[1][static_cast<int32_t>(g[i])];
    out[3 * i + 2] = table[2][static_cast<int32_t>(b[i])];
  }
}

constexpr PixelOps kOps = {
    copy_row,  resize_rows, unpack_row,  resize_column, brightness,  contrast,    saturation,  hue,
    grayscale, solarize,    blur_column, blur_row,      store_uint8, store_float, store_table,
};
