#include "winograd_ops.h"

#define BAGSSL_WINOGRAD_TABLE kBaselineWinogradOps
#include "winograd_body.h"
