#include "pixel_ops.h"

#define BAGSSL_OPS_TABLE kBaselinePixelOps
#define BAGSSL_OPS_NAME "baseline"
#include "pixel_ops_body.h"
