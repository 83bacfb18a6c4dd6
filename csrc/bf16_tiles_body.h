// Matrix products of bfloat16, summed in float32, in tiles that stay in registers; the layouts are
// those of conv_bf16_ops.h. Part of the body of conv_bf16; see simd_levels.h.

#include "bfloat16_body.h"

/// Two vectors beside each other.
BAGSSL_INLINE void write_both(BFloat16* to, Floats first, Floats second) {
#if defined(BAGSSL_AVX512_BF16)
  const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
  __builtin_memcpy(to, &both, sizeof both);
#else
  write(to, first);
  write(to + kLanes, second);
#endif
}

#if defined(BAGSSL_AMX)

/// While it lives, all eight tiles are 16 rows of 64 bytes. Others in this thread may rely on what
/// they configured before (oneDNN remembers it), so that is put back.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    static_assert(sizeof config == 64, "");
    _tile_storeconfig(before_);
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_loadconfig(before_); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

/// out = a b, 16 or 32 rows and 32 columns; see product.
template <bool kTall, bool kAdd, int64_t kStep>
BAGSSL_INLINE void product_of_tiles(const BFloat16* a, const BFloat16* b, int64_t pairs, float* out,
                                    int64_t out_step) {
  constexpr long kRow = sizeof(BFloat16) * kRowStep16, kPairs = sizeof(BFloat16) * kStep;
  const long out_row = static_cast<long>(sizeof(float)) * out_step;
  float* const below = out + 16 * out_step;
  // The tile instructions do not tell the compiler what they read.
  __asm__ volatile("" ::: "memory");
  if (kAdd) {
    _tile_loadd(0, out, out_row);
    _tile_loadd(1, out + 16, out_row);
    if (kTall) _tile_loadd(2, below, out_row);
    if (kTall) _tile_loadd(3, below + 16, out_row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (kTall) _tile_zero(2);
    if (kTall) _tile_zero(3);
  }
  for (; pairs > 0; pairs -= 16, a += 32, b += 16 * kStep) {
    _tile_loadd(4, a, kRow);
    _tile_loadd(6, b, kPairs);
    _tile_loadd(7, b + 32, kPairs);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (kTall) {
      _tile_loadd(5, a + 16 * kRowStep16, kRow);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, out_row);
  _tile_stored(1, out + 16, out_row);
  if (kTall) _tile_stored(2, below, out_row);
  if (kTall) _tile_stored(3, below + 16, out_row);
}

#else

struct Tiles {
  Tiles() {}  // not trivial: a variable of it is no unused one
};

BAGSSL_INLINE Floats first_of(Bits pairs) { return reinterpret_cast<Floats>(pairs << 16); }
BAGSSL_INLINE Floats second_of(Bits pairs) { return reinterpret_cast<Floats>(pairs & 0xffff0000u); }

/// sums + the products of the two pairs of each lane.
BAGSSL_INLINE Floats add_pairs(Floats sums, Bits x, Bits y) {
#if defined(BAGSSL_AVX512_BF16)
  return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
#else
  return multiply_add(first_of(x), first_of(y), multiply_add(second_of(x), second_of(y), sums));
#endif
}

BAGSSL_INLINE Bits load_pairs(const BFloat16* from) {
  Bits x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

/// Two vectors of columns of kRows rows.
template <int kRows, bool kAdd, int64_t kStep>
BAGSSL_INLINE void product_of_vectors(const BFloat16* a, const BFloat16* b, int64_t pairs,
                                      float* out, int64_t out_step) {
  Floats sums[kRows][2] = {};
  for (int64_t k = 0; k < pairs; ++k, b += kStep) {
    const Bits panel[2] = {load_pairs(b), load_pairs(b + 2 * kLanes)};
    BAGSSL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      uint32_t pair;
      __builtin_memcpy(&pair, a + r * kRowStep16 + 2 * k, sizeof pair);
      sums[r][0] = add_pairs(sums[r][0], splat(pair), panel[0]);
      sums[r][1] = add_pairs(sums[r][1], splat(pair), panel[1]);
    }
  }
  BAGSSL_UNROLL
  for (int r = 0; r < kRows; ++r) {
    float* to = out + r * out_step;
    store(to, kAdd ? load(to) + sums[r][0] : sums[r][0]);
    store(to + kLanes, kAdd ? load(to + kLanes) + sums[r][1] : sums[r][1]);
  }
}

#endif

/// out[r][j] = the sum over k of a[r][k] b[k][j] for `rows` rows, up to 32, and 32 columns; kAdd:
/// added to what is there. Of b two neighboring k lie in each column's pair, and the next two are
/// kStep numbers on; rows of a are packed. All of 32 rows of a and of out, and k up to the next
/// multiple of 32, may be read or written; there a or b is 0 and the other one finite.
template <bool kAdd, int64_t kStep>
BAGSSL_INLINE void product(int64_t rows, const BFloat16* a, const BFloat16* b, int64_t pairs,
                           float* out, int64_t out_step) {
#if defined(BAGSSL_AMX)
  if (rows > 16) {
    product_of_tiles<true, kAdd, kStep>(a, b, pairs, out, out_step);
  } else {
    product_of_tiles<false, kAdd, kStep>(a, b, pairs, out, out_step);
  }
#else
  constexpr int kRows = kLanes > 4 ? kLanes / 2 : 2;
  for (int64_t column = 0; column < kPanel16; column += 2 * kLanes) {
    for (int64_t row = 0; row < rows; row += kRows) {
      product_of_vectors<kRows, kAdd, kStep>(a + row * kRowStep16, b + 2 * column, pairs,
                                             out + row * out_step + column, out_step);
    }
  }
#endif
}

/// to[c][r] = from[r][c], 32 rows and 8 columns; rows of both are kRowStep16 apart.
BAGSSL_INLINE void transpose(const BFloat16* from, BFloat16* to) {
#if defined(BAGSSL_AVX512)
  // Lane i of a vector has rows 8 i to 8 i + 7: eight of 8 x 8 are transposed within lanes.
  __m512i a[8], b[8];
  const auto row = [&](int r) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * kRowStep16));
  };
  BAGSSL_UNROLL
  for (int r = 0; r < 8; ++r) {
    a[r] = _mm512_castsi128_si512(row(r));
    a[r] = _mm512_inserti32x4(a[r], row(r + 8), 1);
    a[r] = _mm512_inserti32x4(a[r], row(r + 16), 2);
    a[r] = _mm512_inserti32x4(a[r], row(r + 24), 3);
  }
  BAGSSL_UNROLL
  for (int r = 0; r < 4; ++r) {
    b[r] = _mm512_unpacklo_epi16(a[2 * r], a[2 * r + 1]);      // columns 0 to 3, rows 2 r, 2 r + 1
    b[r + 4] = _mm512_unpackhi_epi16(a[2 * r], a[2 * r + 1]);  // columns 4 to 7
  }
  BAGSSL_UNROLL
  for (int half = 0; half < 8; half += 4) {
    const __m512i* in = b + half;
    __m512i* out = a + half;
    const __m512i low = _mm512_unpacklo_epi32(in[0], in[1]),
                  low2 = _mm512_unpacklo_epi32(in[2], in[3]);
    const __m512i high = _mm512_unpackhi_epi32(in[0], in[1]),
                  high2 = _mm512_unpackhi_epi32(in[2], in[3]);
    out[0] = _mm512_unpacklo_epi64(low, low2);
    out[1] = _mm512_unpackhi_epi64(low, low2);
    out[2] = _mm512_unpacklo_epi64(high, high2);
    out[3] = _mm512_unpackhi_epi64(high, high2);
  }
  BAGSSL_UNROLL
  for (int c = 0; c < 8; ++c) _mm512_storeu_si512(to + c * kRowStep16, a[c]);
#else
  for (int64_t r = 0; r < 32; ++r) {
    for (int64_t c = 0; c < 8; ++c) to[c * kRowStep16 + r] = from[r * kRowStep16 + c];
  }
#endif
}

/// Two rows of 32 columns as pairs. Column j of the pairs is column kOrder[j] of the rows.
BAGSSL_INLINE void interleave(const BFloat16* first, const BFloat16* second, BFloat16* to) {
#if defined(BAGSSL_AVX512)
  const __m512i x = _mm512_loadu_si512(first), y = _mm512_loadu_si512(second);
  _mm512_storeu_si512(to, _mm512_unpacklo_epi16(x, y));
  _mm512_storeu_si512(to + 32, _mm512_unpackhi_epi16(x, y));
#else
  for (int c = 0; c < 32; ++c) {
    to[2 * c] = first[c];
    to[2 * c + 1] = second[c];
  }
#endif
}

#if defined(BAGSSL_AVX512)
// What unpacking within lanes of 8 gives.
constexpr int8_t kOrder[32] = {0, 1, 2, 3, 8,  9,  10, 11, 16, 17, 18, 19, 24, 25, 26, 27,
                               4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
#else
constexpr int8_t kOrder[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                               16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
#endif
