// Vectors of floats. Part of the files that are compiled once per instruction set; hence no include
// guard and nothing from std.

namespace bagssl {
namespace {

#ifdef BAGSSL_V3
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));

inline Floats load(const float* from) {
  Floats x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

inline void store(float* to, Floats x) { __builtin_memcpy(to, &x, sizeof(x)); }

inline Floats splat(float x) { return x - Floats{}; }

}  // namespace
}  // namespace bagssl
