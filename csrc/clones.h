#pragma once

/// A function compiled twice, for every processor and for x86-64-v3 (AVX2, FMA); the loader picks
/// one. What it calls inline is compiled along with it.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GLIBC__) && defined(__GNUC__)
#define BAGSSL_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define BAGSSL_CLONES
#endif
