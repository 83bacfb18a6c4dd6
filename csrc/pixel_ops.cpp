#include "pixel_ops.h"

#define BAGSSL_BODY "pixel_ops_body.h"
#define BAGSSL_UP_TO_AVX2  // rows are padded for vectors of 32 bytes
#include "simd_levels.h"

namespace bagssl {

const PixelOps& pixel_ops() { return *BAGSSL_PICK(kOps); }

}  // namespace bagssl
