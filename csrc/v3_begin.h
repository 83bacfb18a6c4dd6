// Code from here to v3_end.h is compiled for x86-64-v3. It instantiates nothing from the library:
// an inline function that reached the linker from there could be taken for everybody's. Hence no
// include guard; what the code needs of the library is included before.
#define BAGSSL_V3 1
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
