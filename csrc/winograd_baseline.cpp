#include "winograd_ops.h"

#define BAGSSL_WINOGRAD_TABLE kBaselineWinogradOps
#define BAGSSL_OPS_NAME "baseline"
#include "winograd_body.h"
