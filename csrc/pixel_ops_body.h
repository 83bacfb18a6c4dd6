// The loops of pixel_ops.h. Included once per instruction set, each time with BAGSSL_OPS_TABLE
// and BAGSSL_OPS_NAME set; hence no include guard and nothing from std.

#include "pixel_ops_resize.h"

#ifndef BAGSSL_RESTRICT
#define BAGSSL_RESTRICT __restrict
#endif

namespace bagssl {
namespace {

inline float larger(float x, float y) { return x > y ? x : y; }
inline float smaller(float x, float y) { return x < y ? x : y; }

/// Towards zero, |x| < 2^31.
inline float truncate(float x) {
#ifdef BAGSSL_V3
  return __builtin_truncf(x);
#else
  return static_cast<float>(static_cast<int32_t>(x));
#endif
}

/// Down, |x| < 2^31.
inline float floor_near_zero(float x) {
#ifdef BAGSSL_V3
  return __builtin_floorf(x);
#else
  const float whole = truncate(x);
  return whole > x ? whole - 1.0f : whole;
#endif
}

inline float clamp255(float x) {
  x = x > 0.0f ? x : 0.0f;
  return x < 255.0f ? x : 255.0f;
}

/// rgb_to_grayscale before it is cast, floored: torch's chain of two fused multiply-adds.
inline float gray(float r, float g, float b) {
  return truncate(__builtin_fmaf(b, 0.114f, __builtin_fmaf(g, 0.587f, r * 0.2989f)));
}

void brightness(Planes planes, float factor) {
  for (float* x : planes.channel) {
    for (int i = 0; i < planes.size; ++i) x[i] = truncate(smaller(x[i] * factor, 255.0f));
  }
}

void contrast(Planes planes, float factor, int pixels) {
  const float *r = planes.channel[0], *g = planes.channel[1], *b = planes.channel[2];
  int32_t sum = 0;  // 255 * 2^23 pixels fit
  for (int i = 0; i < planes.size; ++i) sum += static_cast<int32_t>(gray(r[i], g[i], b[i]));
  const float mean = static_cast<float>(sum) / static_cast<float>(pixels);
  const float rest = 1.0f - factor;
  for (float* x : planes.channel) {
    for (int i = 0; i < planes.size; ++i) {
      x[i] = truncate(clamp255(__builtin_fmaf(mean, rest, x[i] * factor)));
    }
  }
}

void saturation(Planes planes, float factor) {
  float *BAGSSL_RESTRICT r = planes.channel[0], *BAGSSL_RESTRICT g = planes.channel[1],
                         *BAGSSL_RESTRICT b = planes.channel[2];
  const float rest = 1.0f - factor;
  for (int i = 0; i < planes.size; ++i) {
    const float grey = gray(r[i], g[i], b[i]);
    r[i] = truncate(clamp255(__builtin_fmaf(grey, rest, r[i] * factor)));
    g[i] = truncate(clamp255(__builtin_fmaf(grey, rest, g[i] * factor)));
    b[i] = truncate(clamp255(__builtin_fmaf(grey, rest, b[i] * factor)));
  }
}

/// torch's _rgb_to_hsv, shift, _hsv_to_rgb and cast, with the same roundings and less work: of a
/// pixel's two differences from the maximum one is the range itself, so one quotient is 1; and of
/// the four values that _hsv_to_rgb chooses from, v and p are the largest and the smallest channel
/// exactly, and only one of q and t occurs.
void hue(Planes planes, float shift) {
  float *BAGSSL_RESTRICT red = planes.channel[0], *BAGSSL_RESTRICT green = planes.channel[1],
                         *BAGSSL_RESTRICT blue = planes.channel[2];
  constexpr float kByte = static_cast<float>(1.0 / 255.0), kSixth = static_cast<float>(1.0 / 6.0);
  constexpr float kToByte = static_cast<float>(255.0 + 1.0 - 1e-3);
  constexpr float kNoZero = 1e-3f;  // below any range or maximum but 0, where h does not matter
  for (int i = 0; i < planes.size; ++i) {
    const float r = red[i], g = green[i], b = blue[i];
    const float high = larger(larger(r, g), b), low = smaller(smaller(r, g), b);
    const float v = high * kByte, range = v - low * kByte;
    const float quotient = (v - (r + g + b - high - low) * kByte) / larger(range, kNoZero);
    const float s = range / larger(v, kNoZero);

    // Torch: bc - gc where the maximum is r, else 2 + rc - bc where it is g, else 4 + gc - rc.
    const float base = high == r ? 0.0f : high == g ? 2.0f : 4.0f;
    const float added = high == r ? b : high == g ? r : g;
    const float h0 = added == low ? (base + 1.0f) - quotient : (quotient + base) - 1.0f;
    const float h1 = h0 * kSixth + 1.0f;
    const float h2 = (h1 - truncate(h1)) + shift;
    const float h = (h2 - floor_near_zero(h2)) * 6.0f;

    const int32_t sector = static_cast<int32_t>(h);  // 6, after a rounding, is the same as 0
    const float sf = s * (h - static_cast<float>(sector));
    const float x = (sector & 1) != 0 ? 1.0f - sf : sf + (1.0f - s);
    const float middle = truncate(x * v * kToByte);
    const float r01 = h >= 1.0f ? middle : high, r23 = h >= 2.0f ? low : r01;
    const float r4 = h >= 4.0f ? middle : r23;
    const float g12 = h >= 1.0f ? high : middle, g3 = h >= 3.0f ? middle : g12;
    const float b2 = h >= 2.0f ? middle : low, b34 = h >= 3.0f ? high : b2;
    red[i] = h >= 5.0f ? high : r4;
    green[i] = h >= 4.0f ? low : g3;
    blue[i] = h >= 6.0f ? low : h >= 5.0f ? middle : b34;
  }
}

void grayscale(Planes planes) {
  float *r = planes.channel[0], *g = planes.channel[1], *b = planes.channel[2];
  for (int i = 0; i < planes.size; ++i) r[i] = g[i] = b[i] = gray(r[i], g[i], b[i]);
}

void solarize(Planes planes, float threshold) {
  for (float* x : planes.channel) {
    for (int i = 0; i < planes.size; ++i) x[i] = x[i] >= threshold ? 255.0f - x[i] : x[i];
  }
}

void blur_column(const float* const* rows, const float* weights, int kernel, int width,
                 float* out) {
  for (int x = 0; x < width; ++x) out[x] = weights[0] * rows[0][x];
  for (int k = 1; k < kernel; ++k) {
    const float weight = weights[k];
    const float* row = rows[k];
    for (int x = 0; x < width; ++x) out[x] += weight * row[x];
  }
}

void blur_row(const float* padded, const float* weights, int kernel, int width, float* out) {
  // Adding and taking away 1.5 * 2^23 leaves the nearest integer, halves to even.
  constexpr float kMagic = 12582912.0f;
  for (int x = 0; x < width; ++x) out[x] = weights[0] * padded[x];
  for (int k = 1; k < kernel; ++k) {
    const float weight = weights[k];
    for (int x = 0; x < width; ++x) out[x] += weight * padded[x + k];
  }
  for (int x = 0; x < width; ++x) out[x] = (out[x] + kMagic) - kMagic;
}

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

}  // namespace

const PixelOps BAGSSL_OPS_TABLE = {
    BAGSSL_OPS_NAME, copy_row,    resize_row,  unpack_row,  resize_column, brightness,
    contrast,        saturation,  hue,         grayscale,   solarize,      blur_column,
    blur_row,        store_uint8, store_float, store_table,
};

}  // namespace bagssl
