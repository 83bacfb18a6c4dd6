#include "pixel_ops.h"

#ifdef BAGSSL_HAS_V3
#include <immintrin.h>

#define BAGSSL_V3 1
#define BAGSSL_OPS_TABLE kV3PixelOps
#define BAGSSL_OPS_NAME "x86-64-v3"
// Only code that follows is compiled for AVX2, and it instantiates nothing from the library: an
// inline function that reached the linker from here could be taken for everybody's.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#include "pixel_ops_body.h"
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "pixel_ops_body.h"
#pragma GCC pop_options
#endif
#endif
