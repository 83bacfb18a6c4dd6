#include "winograd_ops.h"

#ifdef BAGSSL_HAS_V3
#include <immintrin.h>

#define BAGSSL_WINOGRAD_TABLE kV3WinogradOps
#include "v3_begin.h"
// The loops, between the two:
#include "winograd_body.h"
// and no longer for AVX2.
#include "v3_end.h"
#endif
