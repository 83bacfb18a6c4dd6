#include "pixel_ops.h"

#ifdef BAGSSL_HAS_V3
#include <immintrin.h>

#define BAGSSL_OPS_TABLE kV3PixelOps
#define BAGSSL_OPS_NAME "x86-64-v3"
#include "v3_begin.h"
// The loops, between the two:
#include "pixel_ops_body.h"
// and no longer for AVX2.
#include "v3_end.h"
#endif
