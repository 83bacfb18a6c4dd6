#include "pixel_ops.h"

namespace bagssl {

const PixelOps& pixel_ops() {
#ifdef BAGSSL_HAS_V3
  if (use_v3()) return kV3PixelOps;
#endif
  return kBaselinePixelOps;
}

}  // namespace bagssl
