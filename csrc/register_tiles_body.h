// Matrix products in tiles that stay in registers: a broadcast of one operand times vectors of the
// other's panels. Part of the bodies of conv_bn_relu and winograd; see simd_levels.h.

#if defined(BAGSSL_AVX512)
constexpr int kTileRows = 12, kFewRows = 4, kTileColumns = 8;
#elif defined(BAGSSL_AVX2)
constexpr int kTileRows = 6, kFewRows = 2, kTileColumns = 6;
#else
constexpr int kTileRows = 4, kFewRows = 2, kTileColumns = 4;
#endif
constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kLanes;
static_assert(kTileRows <= kMostTileRows && kLanes <= kMostLanes, "");

/// The lines that a product of so many steps fetches, `step` bytes apart: none if step is 0.
struct Lines {
  const char* next;
  int64_t step;
};

BAGSSL_INLINE Lines take(Ahead* ahead, int64_t steps, const void* anything) {
  while (ahead->now < ahead->count && ahead->floats[ahead->now] <= 0) ++ahead->now;
  if (ahead->now == ahead->count) return {static_cast<const char*>(anything), 0};
  const float*& at = ahead->at[ahead->now];
  const Lines lines = {reinterpret_cast<const char*>(at), 64};
  at += 16 * steps;
  ahead->floats[ahead->now] -= 16 * steps;
  return lines;
}

BAGSSL_INLINE void fetch(Lines& lines) {
  __builtin_prefetch(lines.next, 0, 2);
  lines.next += lines.step;
}

/// out[r][j] = sum over k of a[r][k] b[k][j], kRows rows and one panel; kAdd: added to what is
/// there. Rows of a are kWidth floats in each block, and kStep apart.
template <int kRows, bool kAdd, int64_t kWidth, int64_t kStep>
BAGSSL_INLINE void product(const float* a, int64_t block, const float* b, int64_t steps, float* out,
                           int64_t out_step, Lines lines) {
  Floats sums[kRows][kVectors] = {};
  for (; steps > 0; steps -= kWidth, a += block) {
    const int64_t count = at_most(steps, kWidth);
    for (int64_t k = 0; k < count; ++k, b += kPanel) {
      Floats panel[kVectors];
      fetch(lines);
      BAGSSL_UNROLL
      for (int v = 0; v < kVectors; ++v) panel[v] = load(b + v * kLanes);
      BAGSSL_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Floats x = splat(a[r * kStep + k]);
        BAGSSL_UNROLL
        for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add(x, panel[v], sums[r][v]);
      }
    }
  }
  BAGSSL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    BAGSSL_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* to = out + r * out_step + v * kLanes;
      store(to, kAdd ? load(to) + sums[r][v] : sums[r][v]);
    }
  }
}

/// The product of `rows` rows; rows up to kTileRows are written.
template <bool kAdd = false, int64_t kWidth = kBlock, int64_t kStep = kRowStep>
BAGSSL_INLINE void product_of_rows(int64_t rows, const float* a, int64_t block, const float* b,
                                   int64_t steps, float* out, int64_t out_step, Lines lines) {
  if (rows > kFewRows) {
    product<kTileRows, kAdd, kWidth, kStep>(a, block, b, steps, out, out_step, lines);
  } else {
    product<kFewRows, kAdd, kWidth, kStep>(a, block, b, steps, out, out_step, lines);
  }
}

/// sums[i][j] += sum over rows of a[row][i] dy[row][j], kTileColumns columns and one panel.
template <int64_t kStep = kRowStep>
BAGSSL_INLINE void outer_product(const float* a, const float* dy, int64_t rows, float* out,
                                 Lines lines) {
  Floats sums[kTileColumns][kVectors];
  BAGSSL_UNROLL
  for (int i = 0; i < kTileColumns; ++i) {
    BAGSSL_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[i][v] = load(out + i * kPanel + v * kLanes);
  }
  for (int64_t row = 0; row < rows; ++row, a += kStep, dy += kStep) {
    Floats panel[kVectors];
    fetch(lines);
    BAGSSL_UNROLL
    for (int v = 0; v < kVectors; ++v) panel[v] = load(dy + v * kLanes);
    BAGSSL_UNROLL
    for (int i = 0; i < kTileColumns; ++i) {
      const Floats x = splat(a[i]);
      BAGSSL_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[i][v] = multiply_add(x, panel[v], sums[i][v]);
    }
  }
  BAGSSL_UNROLL
  for (int i = 0; i < kTileColumns; ++i) {
    BAGSSL_UNROLL
    for (int v = 0; v < kVectors; ++v) store(out + i * kPanel + v * kLanes, sums[i][v]);
  }
}
