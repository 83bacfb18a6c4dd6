#include "pixel_ops.h"
#include "winograd_ops.h"

#ifdef BAGSSL_HAS_V3
#include <immintrin.h>

#define BAGSSL_V3 1
#define BAGSSL_WINOGRAD_TABLE kV3WinogradOps
#define BAGSSL_OPS_NAME "x86-64-v3"
// As in pixel_ops_v3.cpp: only code that follows is compiled for AVX2.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#include "winograd_body.h"
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "winograd_body.h"
#pragma GCC pop_options
#endif
#endif
