// Vectors of kVectorBytes bytes, with the operators of numbers. Included by simd_levels.h once per
// level, inside the level's namespace.

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

using Floats = Vector<float>;
using Ints = Vector<int32_t>;             // also the masks that comparisons of Floats give
constexpr int kLanes = kVectorBytes / 4;  // of Floats and Ints

template <typename T>
BAGSSL_INLINE Vector<T> load(const T* from) {
  Vector<T> x;
  __builtin_memcpy(&x, from, kVectorBytes);
  return x;
}

template <typename T>
BAGSSL_INLINE void store(T* to, Vector<T> x) {
  __builtin_memcpy(to, &x, kVectorBytes);
}

/// The first `count` values, the other lanes zero; at most the whole vector, at least nothing.
template <typename T>
inline Vector<T> load_some(const T* from, int64_t count) {
  if (count >= static_cast<int64_t>(kVectorBytes / sizeof(T))) return load(from);
  Vector<T> x = {};
  if (count > 0) __builtin_memcpy(&x, from, sizeof(T) * static_cast<unsigned long>(count));
  return x;
}

template <typename T>
inline void store_some(T* to, Vector<T> x, int64_t count) {
  if (count >= static_cast<int64_t>(kVectorBytes / sizeof(T))) return store(to, x);
  if (count > 0) __builtin_memcpy(to, &x, sizeof(T) * static_cast<unsigned long>(count));
}

template <typename T>
BAGSSL_INLINE Vector<T> splat(T x) {
  return x - Vector<T>{};
}

// multiply_add: x * y + z, multiply_subtract: z - x * y, rounded once where the level can, so that
// levels differ in last bits. fused: x * y + z rounded once at every level, slow at the baseline.

#if defined(BAGSSL_AVX512)

BAGSSL_INLINE Floats multiply_add(Floats x, Floats y, Floats z) { return _mm512_fmadd_ps(x, y, z); }
BAGSSL_INLINE Vector<double> multiply_add(Vector<double> x, Vector<double> y, Vector<double> z) {
  return _mm512_fmadd_pd(x, y, z);
}
BAGSSL_INLINE Floats multiply_subtract(Floats x, Floats y, Floats z) {
  return _mm512_fnmadd_ps(x, y, z);
}
BAGSSL_INLINE Vector<double> multiply_subtract(Vector<double> x, Vector<double> y,
                                               Vector<double> z) {
  return _mm512_fnmadd_pd(x, y, z);
}
BAGSSL_INLINE Floats fused(Floats x, Floats y, Floats z) { return multiply_add(x, y, z); }

#elif defined(BAGSSL_AVX2)

BAGSSL_INLINE Floats multiply_add(Floats x, Floats y, Floats z) { return _mm256_fmadd_ps(x, y, z); }
BAGSSL_INLINE Vector<double> multiply_add(Vector<double> x, Vector<double> y, Vector<double> z) {
  return _mm256_fmadd_pd(x, y, z);
}
BAGSSL_INLINE Floats multiply_subtract(Floats x, Floats y, Floats z) {
  return _mm256_fnmadd_ps(x, y, z);
}
BAGSSL_INLINE Vector<double> multiply_subtract(Vector<double> x, Vector<double> y,
                                               Vector<double> z) {
  return _mm256_fnmadd_pd(x, y, z);
}
BAGSSL_INLINE Floats fused(Floats x, Floats y, Floats z) { return multiply_add(x, y, z); }

#else

template <typename V>
BAGSSL_INLINE V multiply_add(V x, V y, V z) {
  return x * y + z;
}
template <typename V>
BAGSSL_INLINE V multiply_subtract(V x, V y, V z) {
  return z - x * y;
}
BAGSSL_INLINE Floats fused(Floats x, Floats y, Floats z) {
  for (int i = 0; i < kLanes; ++i) z[i] = __builtin_fmaf(x[i], y[i], z[i]);
  return z;
}

#endif

BAGSSL_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/// max(x, 0), of NaN NaN.
BAGSSL_INLINE Floats positive(Floats x) {
#if defined(BAGSSL_AVX512)
  return _mm512_max_ps(Floats{}, x);
#elif defined(BAGSSL_AVX2)
  return _mm256_max_ps(Floats{}, x);
#else
  const Floats zero = {};
  return x < zero ? zero : x;
#endif
}
