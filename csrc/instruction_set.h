#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define BAGSSL_HAS_V3 1  // loops are also compiled for x86-64-v3: AVX2, FMA
#endif

namespace bagssl {

/// Whether the loops for x86-64-v3 run, or those every processor of this architecture can run.
bool use_v3();

/// Makes use_v3() false (for tests; affects the whole process).
void force_baseline(bool force);

}  // namespace bagssl
