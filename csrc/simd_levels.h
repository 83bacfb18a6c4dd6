// Compiles a body of loops once per SIMD level, for one of them to be chosen at run time. In
// foo.cpp, after the includes and outside of every namespace:
//
//   #define BAGSSL_BODY "foo_body.h"
//   #include "simd_levels.h"
//
//   namespace bagssl {
//   void foo(float* x, int64_t n) { BAGSSL_PICK(foo_loop)(x, n); }
//   }
//
// foo_body.h defines foo_loop, without a namespace or an include guard: it is included in
// bagssl::(anonymous)::baseline, ::avx2 and ::avx512 in turn. BAGSSL_PICK(name) is the address of
// the `name` of the level in force, be it a function, an instance of a template or a constant table
// of functions; it works in namespace bagssl. One body per .cpp; a body may include others.
//
// A body has the vectors of simd_vectors.h, kVectorBytes wide. For intrinsics it asks
// `#ifdef BAGSSL_AVX2` (defined for avx2 and avx512) and `#ifdef BAGSSL_AVX512`; NEON is part of
// the baseline where __ARM_NEON is defined. `#define BAGSSL_UP_TO_AVX2` beside BAGSSL_BODY leaves
// AVX-512 out: the loops of avx2 then run at that level, too. `#define BAGSSL_UP_TO_AMX` adds the
// levels avx512_bf16 and amx, with BAGSSL_AVX512_BF16 and BAGSSL_AMX to ask for; without it the
// loops of avx512 run there.
//
// A body uses nothing from the library but types, and includes nothing of it. An inline function
// or a template instance of std has one name for the whole program: one that was compiled for
// AVX-512 here could be the copy that the linker keeps for everybody. What a body defines itself is
// safe, being local to its level and its file.

#include <cstdint>

#include "simd.h"

#ifdef BAGSSL_X86
#include <immintrin.h>
#endif

#define BAGSSL_INLINE inline __attribute__((always_inline))
#define BAGSSL_UNROLL _Pragma("GCC unroll 16")
#define BAGSSL_PICK(...)                                                                 \
  ::bagssl::pick_level(&baseline::__VA_ARGS__, &avx2::__VA_ARGS__, &avx512::__VA_ARGS__, \
                       &avx512_bf16::__VA_ARGS__, &amx::__VA_ARGS__)

namespace bagssl {
namespace {

namespace baseline {
constexpr int kVectorBytes = 16;
#include "simd_vectors.h"
// The loops:
#include BAGSSL_BODY
}  // namespace baseline

#ifdef BAGSSL_X86

#define BAGSSL_AVX2 1
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
constexpr int kVectorBytes = 32;
#include "simd_vectors.h"
// The loops:
#include BAGSSL_BODY
}  // namespace avx2
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#ifdef BAGSSL_UP_TO_AVX2
namespace avx512 = avx2;
namespace avx512_bf16 = avx2;
namespace amx = avx2;
#else
#define BAGSSL_AVX512 1
#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")
#endif
namespace avx512 {
constexpr int kVectorBytes = 64;
#include "simd_vectors.h"
// The loops:
#include BAGSSL_BODY
}  // namespace avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(BAGSSL_UP_TO_AMX) && defined(BAGSSL_X86_BF16)
#define BAGSSL_AVX512_BF16 1
#ifdef __clang__
#pragma clang attribute push(                                                          \
    __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16")
#endif
namespace avx512_bf16 {
constexpr int kVectorBytes = 64;
#include "simd_vectors.h"
// The loops:
#include BAGSSL_BODY
}  // namespace avx512_bf16
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#define BAGSSL_AMX 1
#ifdef __clang__
#pragma clang attribute push(                                                                 \
    __attribute__((                                                                           \
        target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif
namespace amx {
constexpr int kVectorBytes = 64;
#include "simd_vectors.h"
// The loops:
#include BAGSSL_BODY
}  // namespace amx
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef BAGSSL_AMX
#undef BAGSSL_AVX512_BF16
#else
namespace avx512_bf16 = avx512;
namespace amx = avx512;
#endif
#undef BAGSSL_AVX512
#endif
#undef BAGSSL_AVX2

#else

namespace avx2 = baseline;
namespace avx512 = baseline;
namespace avx512_bf16 = baseline;
namespace amx = baseline;

#endif

}  // namespace
}  // namespace bagssl
