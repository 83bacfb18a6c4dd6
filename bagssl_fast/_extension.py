"""The compiled part, `bagssl_fast._C`, or one sentence on how to get it."""

from __future__ import annotations

try:
    from bagssl_fast import _C
except ImportError as error:
    raise ImportError(
        f"bagssl_fast's C++ extension cannot be loaded ({error}): build it with a C++17 compiler "
        "by `pip install -e .` in the root of the repository."
    ) from None

_C.simd_level()  # refuses a bad BAGSSL_SIMD here, not in a thread of the loader

__all__ = ["_C"]
