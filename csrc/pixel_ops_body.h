// The loops of pixel_ops.h. Included once per instruction set, each time with BAGSSL_OPS_TABLE
// and BAGSSL_OPS_NAME set; hence no include guard, no includes and nothing from std.

namespace bagssl {
namespace {

inline float truncate(float x) { return static_cast<float>(static_cast<int32_t>(x)); }

inline float clamp255(float x) {
  x = x > 0.0f ? x : 0.0f;
  return x < 255.0f ? x : 255.0f;
}

/// rgb_to_grayscale before it is cast, floored: torch's chain of two fused multiply-adds.
inline float gray(float r, float g, float b) {
  return truncate(__builtin_fmaf(b, 0.114f, __builtin_fmaf(g, 0.587f, r * 0.2989f)));
}

inline uint8_t clamp_byte(int32_t x) { return static_cast<uint8_t>(x < 0 ? 0 : x > 255 ? 255 : x); }

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

void copy_row(const uint8_t* row, int width, bool flip, uint8_t* out) {
  for (int i = 0; i < width; ++i) {
    uint8_t* pixel = out + 4 * (flip ? width - 1 - i : i);
    for (int c = 0; c < 3; ++c) pixel[c] = row[3 * i + c];
    pixel[3] = 0;
  }
}

void resize_column(const uint8_t* rows, int bytes, const AxisWeights& weights, int i,
                   uint8_t* out) {
  const int32_t half = 1 << (weights.precision - 1);
  const int16_t* w = weights.weight + static_cast<int64_t>(i) * weights.taps;
  const uint8_t* first = rows + static_cast<int64_t>(weights.start[i]) * bytes;
  for (int x = 0; x < bytes; ++x) {
    int32_t sum = half;
    for (int k = 0; k < weights.window; ++k)
      sum += w[k] * first[static_cast<int64_t>(k) * bytes + x];
    out[x] = clamp_byte(sum >> weights.precision);
  }
}

void unpack(const uint8_t* rgbx, int pixels, Planes planes) {
  float *r = planes.channel[0], *g = planes.channel[1], *b = planes.channel[2];
  for (int i = 0; i < pixels; ++i) {
    r[i] = rgbx[4 * i];
    g[i] = rgbx[4 * i + 1];
    b[i] = rgbx[4 * i + 2];
  }
  for (int i = pixels; i < planes.size; ++i) r[i] = g[i] = b[i] = 0.0f;
}

void brightness(Planes planes, float factor) {
  for (float* x : planes.channel) {
    for (int i = 0; i < planes.size; ++i) x[i] = truncate(clamp255(x[i] * factor));
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
  float *r = planes.channel[0], *g = planes.channel[1], *b = planes.channel[2];
  const float rest = 1.0f - factor;
  for (int i = 0; i < planes.size; ++i) {
    const float grey = gray(r[i], g[i], b[i]);
    r[i] = truncate(clamp255(__builtin_fmaf(grey, rest, r[i] * factor)));
    g[i] = truncate(clamp255(__builtin_fmaf(grey, rest, g[i] * factor)));
    b[i] = truncate(clamp255(__builtin_fmaf(grey, rest, b[i] * factor)));
  }
}

inline float distance(float x, float y) { return __builtin_fabsf(x - y); }

/// torch's _rgb_to_hsv, shift, _hsv_to_rgb and cast, with the same roundings. Of the four values
/// that _hsv_to_rgb chooses from, v and p are the largest and the smallest channel exactly and
/// only one of q and t occurs in a pixel.
void hue(Planes planes, float shift) {
  float *red = planes.channel[0], *green = planes.channel[1], *blue = planes.channel[2];
  constexpr float kByte = static_cast<float>(1.0 / 255.0), kSixth = static_cast<float>(1.0 / 6.0);
  constexpr float kToByte = static_cast<float>(255.0 + 1.0 - 1e-3);
  for (int i = 0; i < planes.size; ++i) {
    const float r8 = red[i], g8 = green[i], b8 = blue[i];
    const float r = r8 * kByte, g = g8 * kByte, b = b8 * kByte;
    const float rg_max = r8 > g8 ? r8 : g8, rg_min = r8 < g8 ? r8 : g8;
    const float max8 = rg_max > b8 ? rg_max : b8, min8 = rg_min < b8 ? rg_min : b8;
    const float v = max8 * kByte, range = v - min8 * kByte;
    const float range_divisor = range == 0.0f ? 1.0f : range;
    const float s = range / (range == 0.0f ? 1.0f : v);

    const bool is_r = max8 == r8, is_g = max8 == g8;
    const float plus = is_r ? b : is_g ? r : g, minus = is_r ? g : is_g ? b : r;
    const float offset = is_r ? 0.0f : is_g ? 2.0f : 4.0f;
    float h = ((v - plus) / range_divisor + offset) - (v - minus) / range_divisor;
    h = h * kSixth + 1.0f;
    h = h >= 1.0f ? h - 1.0f : h;
    h = h + shift;
    h = h < 0.0f ? h + 1.0f : h >= 1.0f ? h - 1.0f : h;

    const float h6 = h * 6.0f;
    const int32_t turn = static_cast<int32_t>(h6);
    const float fraction = h6 - static_cast<float>(turn);
    const float sector = turn == 6 ? 0.0f : static_cast<float>(turn);
    const float sf = s * fraction;
    const float middle = truncate((turn & 1 ? 1.0f - sf : sf + (1.0f - s)) * v * kToByte);
    const float from_r = distance(sector, 2.5f);  // r is v in sectors 5, 0 and p in 2, 3
    const float from_g = distance(sector, 1.5f);  // g is v in 1, 2 and p in 4, 5
    const float from_b = distance(sector, 3.5f);  // b is v in 3, 4 and p in 0, 1
    red[i] = from_r > 2.0f ? max8 : from_r > 1.0f ? middle : min8;
    green[i] = from_g < 1.0f ? max8 : from_g < 2.0f ? middle : min8;
    blue[i] = from_b < 1.0f ? max8 : from_b < 2.0f ? middle : min8;
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
    BAGSSL_OPS_NAME, resize_row,  copy_row,    resize_column, unpack,   brightness,
    contrast,        saturation,  hue,         grayscale,     solarize, blur_column,
    blur_row,        store_uint8, store_float, store_table,
};

}  // namespace bagssl
