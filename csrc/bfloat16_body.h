// Maps of float32 or bfloat16, computed in float32. Part of other bodies; see simd_levels.h.

using Bits = Vector<uint32_t>;  // of Floats, or pairs of bfloat16 with the first in the lower half
typedef BFloat16 Halves __attribute__((vector_size(kVectorBytes / 2)));  // kLanes of them

BAGSSL_INLINE Floats widen(Halves x) {
#if defined(BAGSSL_AVX512)
  const __m512i bits = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x));
  return reinterpret_cast<Floats>(_mm512_slli_epi32(bits, 16));
#else
  return reinterpret_cast<Floats>(__builtin_convertvector(x, Bits) << 16);
#endif
}

/// Rounded to the nearest, of two the even one; of NaN a NaN.
BAGSSL_INLINE Halves narrow(Floats x) {
#if defined(BAGSSL_AVX512_BF16)
  return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(x));
#else
  const Bits bits = reinterpret_cast<Bits>(x);
  Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = x == x ? rounded : (bits >> 16) | 0x40;
#if defined(BAGSSL_AVX512)
  return reinterpret_cast<Halves>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(rounded)));
#else
  return __builtin_convertvector(rounded, Halves);
#endif
#endif
}

// Maps of either type are read and written as Floats. `some`: the first `count` of them.

BAGSSL_INLINE Floats read(const float* from) { return load(from); }
BAGSSL_INLINE Floats read(const BFloat16* from) {
  Halves x;
  __builtin_memcpy(&x, from, sizeof x);
  return widen(x);
}

BAGSSL_INLINE void write(float* to, Floats x) { store(to, x); }
BAGSSL_INLINE void write(BFloat16* to, Floats x) {
  const Halves rounded = narrow(x);
  __builtin_memcpy(to, &rounded, sizeof rounded);
}

inline Floats read_some(const float* from, int64_t count) { return load_some(from, count); }
inline Floats read_some(const BFloat16* from, int64_t count) {
  if (count >= kLanes) return read(from);
  Halves x = {};
  if (count > 0) __builtin_memcpy(&x, from, sizeof(BFloat16) * static_cast<unsigned long>(count));
  return widen(x);
}

inline void write_some(float* to, Floats x, int64_t count) { store_some(to, x, count); }
inline void write_some(BFloat16* to, Floats x, int64_t count) {
  if (count >= kLanes) return write(to, x);
  const Halves rounded = narrow(x);
  if (count > 0) {
    __builtin_memcpy(to, &rounded, sizeof(BFloat16) * static_cast<unsigned long>(count));
  }
}
